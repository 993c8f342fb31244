"""The page in a real browser: what is drawn is read, and compared with what the model says.

With FASTLM_SCREENSHOTS=DIR, pictures of every part are kept there.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.inference import LLM, SamplingParams
from fastlm.model import ModelConfig
from fastlm.nn.attention_weights import AttentionRecorder
from fastlm.serve.vocabularies import BYTES, TRAINED
from fastlm.training import TrainingConfig, prepare, train
from fastlm.training.log import read_log
from tests.inference.conftest import TEXT
from tests.serve.conftest import Running, http, serving

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

STEPS = 20
VIEWS = ("tokens", "next", "generate", "attention", "training")
SAMPLE = "The film was good. 이 영화는 정말"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real training run of a second or two."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    data = prepare([folder / "text.txt"], folder / "data", vocab_size=350)
    model = ModelConfig(data.tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 96, qk_norm=True)
    train(model, TrainingConfig(steps=STEPS, batch_size=2, evaluations=2), data, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def site(run: Path) -> Iterator[Running]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with LLM(str(run), memory=32 << 20) as llm, serving(llm, name="run", run=run) as running:
        yield running
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, site: Running, view: str = "tokens", **options: Any) -> Iterator[Any]:
    """A page that shows `view`; nothing may go wrong in it, and nothing may be asked of anybody else."""
    context = browser.new_context(bypass_csp=True, **{"locale": "en-GB", **options})
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(site.url) else wrong.append(request.url))
    page.goto(f"{site.url}/#{view}")
    page.wait_for_selector(f"#{view}:not([hidden])")
    yield page
    if os.environ.get("FASTLM_SCREENSHOTS"):
        folder = Path(os.environ["FASTLM_SCREENSHOTS"])
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "-", os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0])
        page.screenshot(path=folder / f"{name}.png", full_page=True)
    context.close()
    assert wrong == []


def fill(page: Any, selector: str, text: str) -> None:
    page.fill(selector, text)


def slide(page: Any, selector: str, value: float) -> None:
    page.eval_on_selector(
        selector, "(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }", str(value)
    )


def until(page: Any, read: Callable[[], Any], expected: Any) -> None:
    """Waits until what is drawn is what is expected."""
    for _ in range(100):
        if read() == expected:
            return
        page.wait_for_timeout(50)
    assert read() == expected


def visible(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "↵")


def test_a_text_is_drawn_as_the_tokens_of_each_vocabulary(browser, site: Running) -> None:
    def cards() -> list[dict[str, Any]]:
        return page.eval_on_selector_all(
            ".vocabulary",
            """cards => cards.map(card => ({
                name: card.querySelector("h2").textContent,
                count: card.querySelector(".count").textContent,
                tokens: [...card.querySelectorAll(".token")].map(token => ({
                    id: Number(token.querySelector("small").textContent),
                    shown: token.firstChild.textContent,
                    bytes: token.dataset.bytes,
                    colour: getComputedStyle(token).backgroundColor,
                })),
            }))""",
        )

    with opened(browser, site) as page:
        page.wait_for_selector(".token")
        fill(page, "#tokens-text", SAMPLE)
        tokenizer = site.llm.tokenizer
        ids = tokenizer.encode_ordinary(SAMPLE)
        until(page, lambda: [token["id"] for token in cards()[0]["tokens"]], ids)
        drawn = cards()
        assert [card["name"] for card in drawn[:1] + drawn[-2:]] == ["run", TRAINED, BYTES]
        for card in drawn:
            assert bytes.fromhex("".join(token["bytes"] for token in card["tokens"])).decode() == SAMPLE
            assert card["count"] == f"{len(card['tokens'])} tokens"
            colours: dict[int, str] = {}
            for token in card["tokens"]:
                assert colours.setdefault(token["id"], token["colour"]) == token["colour"]
            assert len(set(colours.values())) > 0.8 * len(colours)
        assert [token["id"] for token in drawn[-1]["tokens"]] == list(SAMPLE.encode())
        whole = [token for token in drawn[0]["tokens"] if not re.fullmatch("([0-9A-F]{2})+", token["shown"])]
        assert [t["shown"] for t in whole] == [visible(tokenizer.decode([t["id"]])) for t in whole]

        page.focus(".vocabulary .strip")
        page.keyboard.press("End")
        last = drawn[0]["tokens"][-1]
        detail = page.text_content(".vocabulary .detail")
        assert f"id {last['id']}" in detail
        assert detail.endswith(tokenizer.token_bytes(last["id"]).hex(" ").upper())
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert f"id {ids[1]}," in page.text_content(".vocabulary .detail")

        fill(page, "#tokens-text", "")
        until(page, lambda: [card["count"] for card in cards()], ["0 tokens"] * len(drawn))


def test_bars_are_the_distribution_and_move_with_temperature_and_filters(browser, site: Running) -> None:
    ids = site.llm.prompt_ids(SAMPLE)
    with torch.inference_mode():
        logits = site.llm.model(torch.tensor([ids]))[0, -1].double()

    def widths() -> list[float]:
        return page.eval_on_selector_all("#bars .fill", "bars => bars.map(bar => parseFloat(bar.style.width) / 100)")

    def check(expected: torch.Tensor) -> None:
        want = [round(value, 3) for value in expected[:12].tolist()]
        until(page, lambda: [round(width, 3) for width in widths()], want)
        page.wait_for_timeout(250)  # the bars' movement
        track = page.eval_on_selector("#bars .track", "node => node.getBoundingClientRect().width")
        drawn = page.eval_on_selector_all("#bars .fill", "bars => bars.map(bar => bar.getBoundingClientRect().width)")
        assert drawn == pytest.approx([value * track for value in widths()], abs=1)

    with opened(browser, site, "next") as page:
        fill(page, "#next-text", SAMPLE)
        order = logits.argsort(descending=True)
        check(logits.softmax(0)[order])
        words = page.eval_on_selector_all("#bars .word", "words => words.map(word => word.textContent)")
        decoded = [site.llm.tokenizer.token_bytes(i) for i in order[:12].tolist()]
        for word, data in zip(words, decoded, strict=True):
            assert word == visible(data.decode()) if not word.startswith("bytes:") else True
        for temperature in (0.3, 2):
            slide(page, "#next-temperature", temperature)
            check((logits / temperature).softmax(0)[order])
        slide(page, "#next-temperature", 1)
        slide(page, "#next-top-k", 3)
        kept = logits[order[:3]].softmax(0)
        check(torch.cat([kept, torch.zeros(9, dtype=torch.float64)]))
        assert page.text_content("#bars li:nth-child(4) .number") == "out"
        assert page.text_content("#next-summary").startswith("3 of ")
        slide(page, "#next-temperature", 0)
        check(torch.tensor([1.0, *[0.0] * 11]))
        page.click("#bars li:nth-child(2) button")
        assert page.input_value("#next-text") == SAMPLE + decoded[1].decode()


def test_text_streams_shaded_by_probability_and_goes_on_from_an_alternative(
    browser, site: Running, monkeypatch
) -> None:
    ids = site.llm.prompt_ids(SAMPLE)
    asked = SamplingParams(max_tokens=60, temperature=0.8, logprobs=10)
    found = (site.llm.generate([ids], replace(asked, seed=seed))[0] for seed in range(50))
    seed, alone = next((seed, text) for seed, text in enumerate(found) if len(text.token_ids) > 20)
    step = site.llm._engine.step
    monkeypatch.setattr(site.llm._engine, "step", lambda: (time.sleep(0.01), step())[1])  # as if the model were larger

    def pieces() -> list[dict[str, Any]]:
        return page.eval_on_selector_all(
            "#written-tokens .piece",
            """nodes => nodes.map(node => ({
                text: node.textContent, probability: Number(node.dataset.probability),
                shade: Number(node.style.getPropertyValue("--s")), colour: getComputedStyle(node).backgroundColor,
            }))""",
        )

    with opened(browser, site, "generate") as page:
        page.evaluate(
            """() => {
                window.lengths = [];
                const tokens = document.getElementById("written-tokens");
                const see = () => window.lengths.push(tokens.children.length);
                new MutationObserver(see).observe(tokens, {childList: true});
            }"""
        )
        fill(page, "#generate-text", SAMPLE)
        fill(page, "#generate-seed", str(seed))
        slide(page, "#generate-top-p", 1)
        page.click("#generate-start")
        page.wait_for_function("document.getElementById('generate-summary').textContent")
        shown = alone.logprobs[:-1] if alone.finish_reason == "eos" else alone.logprobs
        drawn = pieces()
        assert len(drawn) == len(shown)
        for piece, entry in zip(drawn, shown, strict=True):
            assert math.log(piece["probability"]) == pytest.approx(entry.logprob, abs=1e-4)
            assert piece["shade"] == pytest.approx(min(1, -entry.logprob / 6), abs=0.002)
        likeliest = max(drawn, key=lambda piece: piece["probability"])
        least = min(drawn, key=lambda piece: piece["probability"])
        assert likeliest["colour"] != least["colour"]
        lengths = page.evaluate("window.lengths")
        assert len({n for n in lengths if 0 < n < len(drawn)}) > 2, "the text came at once, not in a stream"

        page.click("#w5")
        rows = page.eval_on_selector_all(
            "#alternatives-list button",
            "rows => rows.map(row => parseFloat(row.querySelector('.fill').style.width))",
        )
        top = alone.logprobs[5].top
        assert rows[:10] == pytest.approx([100 * math.exp(p) for _, p in top], rel=1e-3)
        other = next(i for i, (token, _) in enumerate(top) if token != alone.token_ids[5])
        page.click(f"#alternatives-list li:nth-child({other + 1}) button")
        page.wait_for_function("document.getElementById('generate-stop').hidden")
        again = pieces()
        assert [piece["text"] for piece in again[:5]] == [piece["text"] for piece in drawn[:5]]
        chosen = ids + alone.token_ids[:5] + [top[other][0]]
        (rest,) = site.llm.generate([chosen], replace(asked, seed=seed))
        shown = rest.logprobs[:-1] if rest.finish_reason == "eos" else rest.logprobs
        probabilities = [math.exp(top[other][1]), *(math.exp(entry.logprob) for entry in shown)]
        until(page, lambda: len(pieces()), 5 + len(probabilities))
        assert [piece["probability"] for piece in pieces()[5:]] == pytest.approx(probabilities, rel=1e-3)


def test_the_attention_map_is_that_of_the_chosen_layer_and_head(browser, site: Running) -> None:
    text = "The film was good"
    ids = site.llm.prompt_ids(text)

    def cells() -> list[list[float | None]]:
        return page.eval_on_selector_all(
            "#map tbody tr",
            """rows => rows.map(row => [...row.querySelectorAll("td")].map(
                cell => cell.classList.contains("never") ? null : Number(cell.dataset.weight)))""",
        )

    with opened(browser, site, "attention") as page:
        fill(page, "#attention-text", text)
        for layer, head in ((0, 0), (1, 2)):
            slide(page, "#attention-layer", layer)
            slide(page, "#attention-head", head)
            recorder = AttentionRecorder(layer, head, torch.device("cpu"))
            with torch.inference_mode():
                site.llm.model.hidden_states(torch.tensor([ids]), recorder)
            expected = [
                [w if key <= query else None for key, w in enumerate(row)]
                for query, row in enumerate(recorder.weights.tolist())
            ]
            until(
                page, lambda: [[w is None for w in row] for row in cells()], [[w is None for w in r] for r in expected]
            )
            seen = [w for row in expected for w in row if w is not None]
            until(page, lambda: [w for row in cells() for w in row if w is not None], pytest.approx(seen, abs=2e-4))
            assert page.text_content("#attention-layer-value") == f"{layer + 1} of 2"
        row = expected[-1]
        colours = page.eval_on_selector_all(
            "#map tbody tr:last-child td", "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
        )
        assert colours[row.index(max(row))] != colours[row.index(min(row))]
        page.focus(".map-frame")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        weight = float(page.get_attribute("#map .active", "data-weight"))
        assert float(re.findall(r"([\d.]+) %", page.text_content("#attention-summary"))[-1]) == pytest.approx(
            100 * weight, abs=0.51
        )


def test_the_loss_curve_is_that_of_the_runs_log(browser, site: Running, run: Path) -> None:
    lines = read_log(run / "log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    valid = [line["valid_loss"] for line in lines if "valid_loss" in line]
    with opened(browser, site, "training") as page:
        points = re.findall(r"[ML]([\d.]+) ([\d.]+)", page.get_attribute("#curve .train", "d"))
        assert len(points) == len(losses) == STEPS
        heights = [float(y) for _, y in points]
        low, high = losses.index(min(losses)), losses.index(max(losses))
        assert heights[low] == max(heights)  # y grows downward
        assert heights[high] == min(heights)
        slope = (heights[low] - heights[high]) / (losses[high] - losses[low])
        assert heights == pytest.approx([heights[low] - slope * (loss - losses[low]) for loss in losses], abs=0.2)
        assert page.locator("#curve .valid-dot").count() == len(valid)
        assert f"{valid[-1]:.3f}" in page.text_content("#training-facts")
        box = page.locator("#curve").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 50)
        assert page.text_content("#curve-readout").startswith(f"Step {STEPS}: training {losses[-1]:.3f}")


def test_the_tab_of_training_is_hidden_for_a_model_without_a_run(browser, server: Running) -> None:
    with opened(browser, server) as page:
        page.wait_for_selector(".token")
        assert not page.is_visible("#tab-training")


def test_all_is_reached_by_keyboard(browser, site: Running) -> None:
    with opened(browser, site) as page:
        page.wait_for_selector(".token")
        page.focus("#tab-tokens")
        for view in VIEWS[1:]:
            page.keyboard.press("ArrowRight")
            page.wait_for_selector(f"#{view}:not([hidden])")
            assert page.evaluate("document.activeElement.id") == f"tab-{view}"
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "generate-start":
                break
        page.keyboard.press("Enter")
        page.wait_for_selector("#w5")
        page.wait_for_function("document.getElementById('generate-stop').hidden")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "written-tokens"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert page.is_visible("#alternatives")
        assert page.evaluate("document.activeElement.closest('#alternatives') !== null")
        page.keyboard.press("Escape")
        assert not page.is_visible("#alternatives")
        assert page.evaluate("document.activeElement.id") == "written-tokens"


def test_korean_and_english_have_the_same_words_and_the_choice_is_kept(browser, site: Running) -> None:
    with opened(browser, site, locale="ko-KR") as page:
        page.wait_for_selector(".token")
        assert page.get_attribute("html", "lang") == "ko"
        assert page.text_content("#tab-next") == "다음 토큰"
        names = page.eval_on_selector_all(
            "[data-text], [data-label]", "nodes => nodes.map(n => n.dataset.text || n.dataset.label)"
        )
        source = resources.files("fastlm.serve").joinpath("page", "i18n.js").read_text(encoding="utf-8")
        english, korean = (re.findall(r'^ {4}"([\w-]+)": ', part, re.MULTILINE) for part in source.split("  ko: {"))
        assert english == korean
        assert set(names) <= set(english)
        page.click("#language")
        assert page.text_content("#tab-next") == "Next token"
        page.reload()
        page.wait_for_selector(".token")
        assert page.get_attribute("html", "lang") == "en"


def test_the_theme_follows_the_system_or_the_choice(browser, site: Running) -> None:
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(browser, site, color_scheme="dark") as page:
        page.wait_for_selector(".token")
        dark = background()
        page.click("#theme")
        assert background() != dark
        page.click("#theme")
        assert background() == dark


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_a_phone(browser, site: Running, view: str) -> None:
    with opened(browser, site, view, viewport={"width": 360, "height": 740}, has_touch=True) as page:
        page.wait_for_timeout(300)
        if view == "generate":
            page.tap("#generate-start")
            page.wait_for_selector("#w5")
            page.tap("#w3")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, site: Running, scheme: str) -> None:
    checker = axe.Axe()
    with opened(browser, site, color_scheme=scheme, reduced_motion="reduce") as page:
        for view in VIEWS:
            page.click(f"#tab-{view}")
            page.wait_for_timeout(300)
            if view == "generate":
                page.click("#generate-start")
                page.wait_for_selector("#w8")
                page.wait_for_function("document.getElementById('generate-stop').hidden")
                page.click("#w3")
            found = checker.run(page).response["violations"]
            serious = [v for v in found if v["impact"] in ("serious", "critical")]
            assert serious == [], f"{view}: {json.dumps([(v['id'], v['nodes'][0]['html']) for v in serious])}"


def test_a_server_with_a_key_asks_for_it_under_its_own_policy(browser, site: Running) -> None:
    with serving(site.llm, name="run", api_key="let-me-in") as locked:
        context = browser.new_context()
        page = context.new_page()
        told: list[str] = []
        page.on("console", lambda message: told.append(message.text))
        page.goto(locked.url)
        page.wait_for_selector("#key-form:not([hidden])")
        assert page.locator(".token").count() == 0
        fill(page, "#key", "let-me-in")
        page.keyboard.press("Enter")
        page.wait_for_selector(".token")
        assert not page.is_visible("#key-form")
        for view in VIEWS[1:4]:
            page.click(f"#tab-{view}")
            page.wait_for_timeout(300)
        assert page.locator("#map td").count() > 0
        context.close()
    assert [text for text in told if "Content Security Policy" in text] == []


def test_the_page_refuses_scripts_and_frames_of_others(site: Running) -> None:
    policy = http.get(site.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
