from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from fastlm._gguf import GgufFile
from fastlm.errors import CheckpointError
from fastlm.model import load_model, save_model
from fastlm.model.gguf import load_gguf
from fastlm.nn import QuantizedEmbedding, QuantizedLinear
from tests.model.architectures import tiny
from tests.model.gguf_files import write_gguf
from tests.model.test_huggingface import assert_equal_logits, logits_of

SEQ = 40
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = ["Q8_0", "Q5_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]

# model, architecture in the file, changes
CASES = {
    "llama": ("llama", "llama", {}),
    "llama with biases": ("llama with biases", "llama", {}),
    "llama tied": ("llama tied", "llama", {"num_key_value_heads": 1}),
    "llama linear scaling": ("llama linear scaling", "llama", {}),
    "qwen2": ("qwen 2", "qwen2", {}),
    "qwen3": ("qwen 3", "qwen3", {}),
    "gemma2": ("gemma 2", "gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma 3", "gemma3", {"query_pre_attn_scalar": 16}),
    "gpt2": ("gpt-2", "gpt2", {}),
}


def ids() -> torch.Tensor:
    return torch.randint(61, (2, SEQ))


@pytest.mark.parametrize("case", list(CASES))
def test_logits_equal_those_of_transformers_also_token_by_token(case: str, tmp_path: Path) -> None:
    name, architecture, changes = CASES[case]
    theirs = tiny(name, **changes)
    write_gguf(tmp_path / "model.gguf", theirs, architecture, lambda _: "F32")
    ours, tokens = load_gguf(tmp_path / "model.gguf"), ids()
    expected = logits_of(theirs, tokens)
    assert_equal_logits(logits_of(ours, tokens), expected)
    with torch.no_grad():
        cache = ours.new_cache(2)
        parts = [ours(tokens[:, :7], cache)] + [ours(tokens[:, i : i + 1], cache) for i in range(7, SEQ)]
    assert_equal_logits(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c != "llama linear scaling"])
def test_a_file_gives_the_config_that_the_models_own_directory_gives(case: str, tmp_path: Path) -> None:
    name, architecture, changes = CASES[case]
    theirs = tiny(name, **changes)
    write_gguf(tmp_path / "model.gguf", theirs, architecture, lambda _: "F32")
    theirs.save_pretrained(tmp_path)
    of_file, of_directory = load_gguf(tmp_path / "model.gguf"), load_model(tmp_path)
    eps = of_file.config.norm_eps  # fp32 in the file
    assert eps == pytest.approx(of_directory.config.norm_eps, rel=1e-6)
    assert {**of_file.config.to_dict(), "norm_eps": 0} == {**of_directory.config.to_dict(), "norm_eps": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama", "gemma3", "qwen2", "gpt2"])
def test_quantized_matrices_stay_as_they_are_and_give_the_logits_of_their_values(
    case: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, architecture, changes = CASES[case]
    wide = {"n_embd": 256, "n_head": 8} if case == "gpt2" else {**WIDE, "head_dim": 64}
    if case == "gemma3":
        wide["query_pre_attn_scalar"] = 64
    theirs = tiny(name, **{**changes, **wide})
    write_gguf(tmp_path / "model.gguf", theirs, architecture, lambda n: "Q8_0" if "token_embd" in n else kind)
    tokens = ids()
    expected = logits_of(theirs, tokens)
    assert_equal_logits(logits_of(load_gguf(tmp_path / "model.gguf", dtype=torch.float32), tokens), expected)

    ours = load_gguf(tmp_path / "model.gguf")
    assert isinstance(ours.model.embed_tokens, QuantizedEmbedding)
    layers = [m for m in ours.modules() if isinstance(m, QuantizedLinear)]
    assert {m.quantization for m in layers} == {kind.lower()}
    assert len(layers) >= 6 * ours.config.num_layers
    monkeypatch.setenv("FASTLM_BACKEND", "reference")
    assert_equal_logits(logits_of(ours, tokens), expected)
    monkeypatch.delenv("FASTLM_BACKEND")
    error = (logits_of(ours, tokens) - expected).norm() / expected.norm()
    # The fast backend rounds activations to 8 bits, which layers of random weights amplify to 0.12. Logits that have
    # nothing to do with the expected ones differ by 1.4.
    assert error < 0.3


def test_rope_factors_give_the_scaling_of_llama_3(tmp_path: Path) -> None:
    theirs = tiny("llama 3 scaling")
    write_gguf(tmp_path / "model.gguf", theirs, "llama", lambda _: "F32", rope_factors=True)
    tokens = ids()
    assert_equal_logits(logits_of(load_gguf(tmp_path / "model.gguf"), tokens), logits_of(theirs, tokens))


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_transformers_reads_the_same_logits_from_the_same_file(case: str, tmp_path: Path) -> None:
    name, architecture, changes = CASES[case]
    if case == "gemma3":  # whose scale of queries transformers takes to be that of a width of 256
        changes = {"query_pre_attn_scalar": 256, "head_dim": 256}
    write_gguf(tmp_path / "model.gguf", tiny(name, **changes), architecture, lambda _: "F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    tokens = ids()
    assert_equal_logits(logits_of(load_gguf(tmp_path / "model.gguf"), tokens), logits_of(theirs, tokens))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_is_viewed_in_the_file_or_widened_on_request(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    theirs = tiny("qwen 2", **WIDE)
    write_gguf(path, theirs, "qwen2", lambda _: kind)
    before, tokens = path.read_bytes(), ids()
    wide = load_gguf(path, dtype=torch.float32)
    assert_equal_logits(logits_of(wide, tokens), logits_of(theirs, tokens))
    ours = load_gguf(path)
    assert {p.dtype for p in ours.parameters() if p.ndim == 2} <= {torch.float16, torch.bfloat16, torch.float32}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before


def test_quantized_loss_is_the_cross_entropy_of_the_logits(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny("gemma 3", **WIDE, head_dim=64), "gemma3", lambda _: "Q8_0")
    ours, tokens = load_gguf(tmp_path / "model.gguf"), torch.randint(61, (5, 50))
    targets = tokens[:, 1:].clone()
    targets[2, 5:] = -100
    with torch.no_grad():
        logits = ours(tokens[:, :-1])
        for reduction in ("mean", "sum", "none"):
            expected = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction=reduction
            ).view(targets.shape if reduction == "none" else ())
            torch.testing.assert_close(ours.loss(tokens[:, :-1], targets, reduction), expected)


def test_a_quantized_model_is_not_saved_but_says_how(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny("llama", **WIDE), "llama", lambda _: "Q8_0")
    with pytest.raises(CheckpointError, match=r"load the model with dtype=torch\.float32"):
        save_model(load_gguf(tmp_path / "model.gguf"), tmp_path / "out")
    save_model(load_gguf(tmp_path / "model.gguf", dtype=torch.float32), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = ids()
    expected = logits_of(load_gguf(tmp_path / "model.gguf", dtype=torch.float32), tokens)
    assert_equal_logits(logits_of(theirs, tokens), expected)


def small_file(path: Path) -> Path:
    theirs = tiny("llama", vocab_size=8, hidden_size=32, num_hidden_layers=1, intermediate_size=32, head_dim=8,
                  num_attention_heads=4)  # fmt: skip
    write_gguf(path, theirs, "llama", lambda _: "Q8_0")
    return path


def rewritten(path: Path, change) -> None:
    """The file again, with metadata and tensors changed by `change(fields, tensors)`."""
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    kinds = {k: f.types[0] for k, f in reader.fields.items()}
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else kinds.get(key, gguf.GGUFValueType.UINT32)
            writer.add_key_value(key, value, kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind if data.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: f.update({"general.architecture": "bert"}), "architecture 'bert' is not supported"),
        (lambda f, t: f.pop("llama.block_count"), "block_count must be an integer"),
        (lambda f, t: f.update({"llama.block_count": 2}), "lacks model.layers.1"),
        (lambda f, t: f.update({"llama.block_count": 2**31}), "num_layers is 2147483648, above the limit"),
        (lambda f, t: f.update({"llama.embedding_length": 64}), r"embed_tokens.weight is \(8, 32\) q8_0"),
        (lambda f, t: f.update({"llama.expert_count": 8}), "expert_count=8 is not supported"),
        (lambda f, t: f.update({"llama.rope.scaling.type": "yarn"}), r"rope.scaling.type='yarn' is not supported"),
        (lambda f, t: f.update({"llama.rope.dimension_count": 2}), "rope.dimension_count=2"),
        (lambda f, t: f.update({"llama.new_trick": 1}), "new_trick=1 is not supported"),
        (lambda f, t: f.update({"llama.attention.head_count_kv": [2, 1]}), "differs from layer to layer"),
        (lambda f, t: f.update({"llama.attention.head_count": "four"}), "attention.head_count must be an integer"),
        (lambda f, t: f.update({"general.alignment": 24}), "general.alignment 24; it must be a power of two"),
        (lambda f, t: t.pop("output_norm.weight"), "lacks model.norm.weight"),
        (lambda f, t: t.pop("token_embd.weight"), "token_embd.weight is missing"),
        (lambda f, t: t.update({"blk.0.ffn_up.bias": (np.zeros(32, np.float32), 0)}), "holds model.layers.0.mlp.up"),
        (lambda f, t: t.update({"blk.0.attn_rot_embd": (np.zeros(32, np.float32), 0)}), "blk.0.attn_rot_embd"),
        (lambda f, t: t.update({"output_norm.weight": (np.zeros(32, np.int8), 0)}), "ggml type 24, which is not supp"),
        (lambda f, t: t.update({"blk.0.attn_q.weight": (np.zeros((15, 32), np.float32), 0)}), "makes no 4 heads"),
        (lambda f, t: t.update({"rope_freqs.weight": (np.zeros(4, np.float32), 0)}), r"factors\[0\] must be"),
        (lambda f, t: t.update({"rope_freqs.weight": (np.ones(3, np.float32), 0)}), "must have 4 factors, not 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_error_that_names_it(change, message: str, tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_gguf(path)
    assert str(path) in str(error.value)


def header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"GGU", "cut short"),
        (b"GGML" + bytes(40), "no GGUF file"),
        (header(0, 0, version=1), "has version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(HUGE, 0), "claims 18446744073709551615 tensors"),
        (header(0, HUGE), "and 18446744073709551615 keys"),
        (header(0, 60_000), "cut short"),
        (header(0, 1, struct.pack("<Q", HUGE)), "a name of 18446744073709551615 bytes"),
        (header(0, 1, text(b"\xff") + struct.pack("<IB", 0, 0)), "no UTF-8"),
        (header(0, 1, text(b"a") + struct.pack("<I", 99)), "unknown type 99"),
        (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 4, HUGE)), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<IIQQ", 9, 8, 1, HUGE)), "cut short"),
        (header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "array of type 9"),
        (header(0, 2, (text(b"a") + struct.pack("<IB", 0, 0)) * 2), "the key 'a' twice"),
        (header(1, 0, tensor_info(b"t", [HUGE, HUGE], 0, 0)), "cut short"),
        (header(1, 0, tensor_info(b"t", [4], 0, HUGE - 31)), "cut short"),
        (header(1, 0, tensor_info(b"t", [4], 0, 8)), "no multiple of 32"),
        (header(1, 0, tensor_info(b"t", [1] * 9, 0, 0)), "9 dimensions"),
        (header(1, 0, tensor_info(b"t", [0, 4], 0, 0)), "no whole blocks"),
        (header(1, 0, tensor_info(b"t", [33], 8, 0)), "no whole blocks of 32"),
        (header(2, 0, tensor_info(b"t", [1], 0, 0) * 2 + bytes(99)), "the tensor 't' twice"),
    ],
)
def test_a_file_that_lies_about_itself_is_refused_before_memory_is_taken(
    data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_gguf(path)


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; give the path of a GGUF file"):
        load_gguf(tmp_path / "nowhere.gguf")


def test_every_truncation_is_one_error(tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    data = path.read_bytes()
    end = max(t.offset + t.num_bytes for t in GgufFile(path).tensors.values())  # what follows is padding
    lengths = {*range(0, 2000, 7), *range(2000, end, 211), end - 1}
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_gguf(path)


@pytest.mark.parametrize("where", ["head", "anywhere"])
def test_thousands_of_mutations_load_or_are_one_error(where: str, tmp_path: Path) -> None:
    path = small_file(tmp_path / "model.gguf")
    data = path.read_bytes()
    head = min(t.offset for t in GgufFile(path).tensors.values())
    rng = np.random.default_rng(torch.initial_seed())
    loaded = refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(head if where == "head" else len(data))
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(changed)
        try:
            load_gguf(path)
            loaded += 1
        except CheckpointError:
            refused += 1
    assert refused > 100
    assert loaded > 10


def test_metadata_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "", "갇힌", "\n" * 300])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("types", [1, -2, 3])
    writer.add_array("empty", [])
    writer.add_bool("flag", True)
    writer.add_float64("wide", 1 / 3)
    writer.add_int64("negative", -(2**60))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert [t.decode() for t in file.array("tokens")] == theirs.get_field("tokens").contents()
    for key in ("scores", "types"):
        assert file.array(key) == theirs.get_field(key).contents()
    for key in ("flag", "wide", "negative", "general.architecture"):
        assert file.metadata[key] == theirs.get_field(key).contents()
    assert file.array("flag") is None
