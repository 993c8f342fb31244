"""Puzzles of the lab in-context: words that a model may know, things for labels that nobody uses, and repetition."""

from __future__ import annotations

import numpy as np
import torch

from fastlm.labs.episodes import IGNORED, Episodes

SYMBOLS = 64
LENGTH = 64
PERIODS = range(8, 25)  # a repetition at one distance alone could be copied by place, without looking at content

_KOREAN_ENGLISH = (
    "물 water,불 fire,나무 tree,사람 person,학교 school,책 book,집 house,고양이 cat,개 dog,하늘 sky,"
    "바다 sea,산 mountain,눈 snow,비 rain,바람 wind,봄 spring,여름 summer,겨울 winter,아침 morning,"
    "밤 night,친구 friend,어머니 mother,아버지 father,음악 music,영화 movie,사랑 love,돈 money,시간 time,"
    "나라 country,도시 city,길 road,문 door,손 hand,머리 head,마음 heart,꽃 flower,새 bird,물고기 fish,"
    "말 horse,소 cow,우유 milk,빵 bread,쌀 rice,차 tea,커피 coffee,병원 hospital,의사 doctor,"
    "선생님 teacher,학생 student,은행 bank,시장 market,가게 store,전화 phone,컴퓨터 computer,편지 letter,"
    "신문 newspaper,빨강 red,파랑 blue,하양 white,검정 black"
)
PAIRS = [(pair.split()[0], pair.split()[1]) for pair in _KOREAN_ENGLISH.split(",")]

_ANIMALS = (
    "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey deer duck goose chicken "
    "eagle owl frog snake whale shark dolphin spider bee ant camel zebra"
)
_TOOLS = (
    "hammer saw drill wrench screwdriver shovel rake axe knife scissors ladder bucket broom mop needle brush pliers "
    "chisel clamp file pump lamp rope nail bolt torch anvil lever wheel pulley crane plow"
)
ANIMALS, TOOLS = _ANIMALS.split(), _TOOLS.split()


def repeated(generator: np.random.Generator, rows: int) -> Episodes:
    """Random symbols that repeat with a period of their own; scored where the one before has occurred already."""
    inputs = np.zeros((rows, LENGTH + 1), dtype=np.int64)
    targets = np.full((rows, LENGTH), IGNORED, dtype=np.int64)
    for row in range(rows):
        period = int(generator.choice(PERIODS))
        pattern = generator.permutation(SYMBOLS)[:period]
        inputs[row] = np.resize(pattern, LENGTH + 1)
        targets[row, period:] = inputs[row, period + 1 :]
    return Episodes(torch.from_numpy(inputs[:, :-1]), torch.from_numpy(targets))
