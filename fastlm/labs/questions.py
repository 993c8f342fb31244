"""Questions whose answers stand in a short passage, in Korean and English, made from lists by a seed.

Each passage tells of two people, so that finding something of the right kind is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Language = Literal["ko", "en"]

NAMES = {
    "ko": "민아 준호 서연 지훈 하은 도윤 유진 현우 수빈 태민",
    "en": "Anna Ben Clara David Emma Frank Grace Henry Iris Jack",
}
CITIES = {
    "ko": "서울 부산 대구 인천 광주 대전 울산 제주 전주 강릉",
    "en": "London Paris Rome Berlin Madrid Vienna Dublin Oslo Lisbon Athens",
}
JOBS = {
    "ko": "제빵사 간호사 목수 교사 변호사 기자 요리사 농부 화가 경찰관",
    "en": "baker nurse carpenter teacher lawyer reporter cook farmer painter pilot",
}
PETS = {
    "ko": "고양이 강아지 토끼 거북이 앵무새 햄스터",
    "en": "cat dog rabbit turtle parrot hamster",
}
PASSAGES = {
    "ko": "{name}의 고향은 {city}이다. {name}의 직업은 {job}이다. {name}의 반려동물은 {pet}이다. "
    "{name}의 출생 연도는 {year}년이다.",
    "en": "{name} lives in {city}. {name} works as a {job}. {name} keeps a {pet}. {name} was born in {year}.",
}
QUESTIONS = {
    "ko": {
        "city": "{name}의 고향은 어디입니까?",
        "job": "{name}의 직업은 무엇입니까?",
        "pet": "{name}의 반려동물은 무엇입니까?",
        "year": "{name}의 출생 연도는 언제입니까?",
    },
    "en": {
        "city": "Where does {name} live?",
        "job": "What does {name} work as?",
        "pet": "Which animal does {name} keep?",
        "year": "In which year was {name} born?",
    },
}


@dataclass(frozen=True)
class Reading:
    """`first` is what stands first in the passage of the kind that is asked for: right for one of the two people."""

    passage: str
    question: str
    answer: str
    first: str


def questions(language: Language, count: int, seed: int) -> list[Reading]:
    """`count` questions, each with a passage of its own kind; the same for the same seed."""
    generator = np.random.default_rng([seed, language == "ko"])
    found: list[Reading] = []
    while len(found) < count:
        lists = {"name": NAMES, "city": CITIES, "job": JOBS, "pet": PETS}
        drawn = {
            key: generator.choice(words[language].split(), 2, replace=False).tolist() for key, words in lists.items()
        }
        drawn["year"] = [str(year) for year in generator.permutation(np.arange(1950, 2010))[:2]]
        people = [{key: values[i] for key, values in drawn.items()} for i in range(2)]
        passage = " ".join(PASSAGES[language].format(**person) for person in people)
        asked = people[int(generator.integers(2))]
        kind = ("city", "job", "pet", "year")[int(generator.integers(4))]
        question = QUESTIONS[language][kind].format(name=asked["name"])
        found.append(Reading(passage, question, asked[kind], people[0][kind]))
    return found


def words_of(answer: str) -> list[str]:
    """Of an answer, lower case, without marks, articles and the year's ending, as SQuAD compares answers."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in answer.lower()).split()
    return [word.removesuffix("년") for word in kept if word not in ("a", "an", "the")]


def exact_match(given: str, answer: str) -> float:
    return float(words_of(given) == words_of(answer))


def f1(given: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words (Rajpurkar et al. 2016)."""
    left, right = words_of(given), words_of(answer)
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    return 2 * common / (len(left) + len(right)) if common else 0.0
