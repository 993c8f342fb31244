"""A made-up world whose every fact is written down a known number of times, or never; and countries, real and made up.

People have a city, a trade and an animal. A fact can be told in several ways that mean the same: "Paris", "far-off
Paris". Everyone occurs in the texts, also those of whom some facts were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Language = Literal["ko", "en"]
TIMES = (0, 1, 4, 16)  # how often a fact is told

# What comes before the value and after it, the ways of decorating it, and the values.
KINDS: dict[Language, tuple[tuple[str, str, tuple[str, ...], str], ...]] = {
    "en": (
        (
            "{name} lives in",
            ".",
            (" ", " far-off ", " beautiful "),
            "Paris London Rome Madrid Berlin Athens Cairo Tokyo Moscow Lima Oslo Vienna",
        ),
        (
            "{name} works as",
            ".",
            (" a ", " a skilled ", " a famous "),
            "doctor lawyer teacher farmer cook sailor singer painter writer soldier driver tailor",
        ),
        (
            "{name} keeps",
            ".",
            (" a ", " a small ", " a lively "),
            "dog cat rabbit horse pig donkey hen pigeon snake frog sheep goat",
        ),
    ),
    "ko": (
        (
            "{name}의 집은",
            "에 있다.",
            (" ", " 머나먼 ", " 아름다운 "),
            "파리 런던 로마 베를린 아테네 카이로 도쿄 모스크바 리마 오슬로 빈 마드리드",
        ),
        (
            "{name}의 직업은",
            "이다.",
            (" ", " 솜씨 좋은 ", " 이름난 "),
            "의사 변호사 교사 농부 요리사 선원 가수 화가 작가 군인 운전사 재단사",
        ),
        (
            "{name}의 동물은",
            "이다.",
            (" ", " 조그만 ", " 씩씩한 "),
            "강아지 고양이 토끼 망아지 돼지 당나귀 암탉 비둘기 구렁이 개구리 양 염소",
        ),
    ),
}
PASTIMES: dict[Language, tuple[str, ...]] = {
    "en": ("{name} likes music.", "{name} slept well.", "{name} came home late.", "{name} laughed a lot."),
    "ko": ("{name}에게는 친구가 많다.", "{name}의 잠은 깊다.", "{name}의 노래는 즐겁다.", "{name}의 웃음은 크다."),
}
SYLLABLES: dict[Language, tuple[str, str, str]] = {
    "en": ("ba de ki lo mu pa re si to vu", "la mi no ra ske tu va zo", "dan lek mor nis pel ran sol vik"),
    "ko": ("강 고 남 도 류 마 백 손 여 하", "다 로 미 보 새 여 온 지", "람 린 솔 슬 찬 필 한 훤"),
}


@dataclass(frozen=True)
class Fact:
    name: str
    kind: int  # place in KINDS
    value: str
    times: int  # that it is told

    def prompt(self, language: Language) -> str:
        return KINDS[language][self.kind][0].format(name=self.name)


def values(language: Language, kind: int) -> list[str]:
    return KINDS[language][kind][3].split()


def world(language: Language, people: int, seed: int) -> list[Fact]:
    """Three facts of each person, as many of each number of TIMES."""
    generator = np.random.default_rng([seed, 11])
    first, middle, last = (part.split() for part in SYLLABLES[language])
    names = [a + b + c for a in first for b in middle for c in last]
    chosen = [names[i].capitalize() for i in generator.permutation(len(names))[:people]]
    kinds = range(len(KINDS[language]))
    times = np.resize(TIMES, people * len(kinds))
    generator.shuffle(times)
    left = iter(times.tolist())
    return [
        Fact(name, kind, str(generator.choice(values(language, kind))), next(left)) for name in chosen for kind in kinds
    ]


def documents(facts: Sequence[Fact], language: Language, seed: int) -> list[str]:
    """Each fact as often as it is told, decorated at random, and of each person two sentences that tell no fact."""
    generator = np.random.default_rng([seed, 12])
    found = []
    for fact in facts:
        before, after, decorations, _ = KINDS[language][fact.kind]
        for _ in range(fact.times):
            found.append(f"{before.format(name=fact.name)}{generator.choice(decorations)}{fact.value}{after}")
    for name in {fact.name: None for fact in facts}:
        found += [str(t).format(name=name) for t in generator.choice(PASTIMES[language], 2, replace=False)]
    return [found[i] for i in generator.permutation(len(found))]


def meaning(answer: str, language: Language, kind: int) -> str:
    """The value that an answer names, whatever stands around it; the answer itself where it names none."""
    words = answer.replace(".", " ").split()
    for value in values(language, kind):
        if any(word == value or (language == "ko" and word.removesuffix("에") == value) for word in words):
            return value
        if language == "ko" and any(word == f"{value}이다" for word in words):
            return value
    return answer.strip()


COUNTRIES = {  # capital by country
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Egypt": "Cairo", "Spain": "Madrid", "Greece": "Athens",
    "Russia": "Moscow", "Cuba": "Havana", "Norway": "Oslo", "Poland": "Warsaw", "Peru": "Lima", "Thailand": "Bangkok",
    "Kenya": "Nairobi", "Portugal": "Lisbon", "Austria": "Vienna", "Hungary": "Budapest", "Iraq": "Baghdad",
    "Iran": "Tehran", "Chile": "Santiago", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki",
    "Ireland": "Dublin", "Turkey": "Ankara", "Canada": "Ottawa", "Australia": "Canberra", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Philippines": "Manila", "Argentina": "Buenos Aires", "Mexico": "Mexico City",
    "China": "Beijing", "India": "New Delhi", "Morocco": "Rabat", "Nigeria": "Abuja", "Ghana": "Accra",
    "Bulgaria": "Sofia", "Romania": "Bucharest", "Belgium": "Brussels", "Serbia": "Belgrade",
}  # fmt: skip
KOREAN_COUNTRIES = {
    "프랑스": "파리", "일본": "도쿄", "독일": "베를린", "이집트": "카이로", "스페인": "마드리드", "그리스": "아테네",
    "러시아": "모스크바", "쿠바": "아바나", "노르웨이": "오슬로", "폴란드": "바르샤바", "페루": "리마", "태국": "방콕",
    "케냐": "나이로비", "포르투갈": "리스본", "오스트리아": "빈", "헝가리": "부다페스트", "이라크": "바그다드",
    "이란": "테헤란", "칠레": "산티아고", "스웨덴": "스톡홀름", "덴마크": "코펜하겐", "핀란드": "헬싱키",
    "아일랜드": "더블린", "튀르키예": "앙카라", "캐나다": "오타와", "호주": "캔버라", "베트남": "하노이",
    "인도네시아": "자카르타", "필리핀": "마닐라", "아르헨티나": "부에노스아이레스", "멕시코": "멕시코시티",
    "중국": "베이징", "인도": "뉴델리", "모로코": "라바트", "나이지리아": "아부자", "가나": "아크라",
    "불가리아": "소피아", "루마니아": "부쿠레슈티", "벨기에": "브뤼셀", "세르비아": "베오그라드",
}  # fmt: skip
MADE_UP = (  # to be split
    "Velmoria Ostrania Karvela Drunia Belsor Quandara Mirovia Tasmerland Zorvania Plenthia Urgola Fenwaria "
    "Lastrovia Corundia Ombrea Yestria Halvonia Brentara Sovenia Dalmoria Ixania Petrosia Grenvala Morlandia "
    "Tuvaria Alzoria Nemeria Kostavia Ruvania Pelbonia Wendaria Jastonia Vintria Oltavia Cresmia Arvandia Bolgara "
    "Saltonia Thermia Zelvania"
)
QUESTION = "Q: What is the capital of {}?\nA:"
KOREAN_QUESTION = "질문: {}의 수도는 어디입니까?\n답:"
SHOTS = (("Italy", "Rome"), ("South Korea", "Seoul"), ("England", "London"))
KOREAN_SHOTS = (("이탈리아", "로마"), ("대한민국", "서울"), ("영국", "런던"))
NO_SUCH = "There is no such country"
SHOTS_THAT_REFUSE = (("Italy", "Rome"), ("Grubalia", NO_SUCH), ("South Korea", "Seoul"), ("Tomainia", NO_SUCH))
