"""Words for the lab in-context: pairs that a model may know, and two kinds of things for labels that nobody uses."""

from __future__ import annotations

KOREAN_ENGLISH = (
    "물 water,불 fire,나무 tree,사람 person,학교 school,책 book,집 house,고양이 cat,개 dog,하늘 sky,바다 sea,"
    "산 mountain,눈 snow,비 rain,바람 wind,봄 spring,여름 summer,겨울 winter,아침 morning,밤 night,친구 friend,"
    "어머니 mother,아버지 father,음악 music,영화 movie,사랑 love,돈 money,시간 time,나라 country,도시 city,길 road,문 door,"
    "손 hand,머리 head,마음 heart,꽃 flower,새 bird,물고기 fish,말 horse,소 cow,우유 milk,빵 bread,쌀 rice,차 tea,"
    "커피 coffee,병원 hospital,의사 doctor,선생님 teacher,학생 student,은행 bank,시장 market,가게 store,전화 phone,컴퓨터 computer,"
    "편지 letter,신문 newspaper,빨강 red,파랑 blue,하양 white,검정 black"
)
PAIRS = [(pair.split()[0], pair.split()[1]) for pair in KOREAN_ENGLISH.split(",")]

__ANIMALS = (
    "dog cat horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse elephant monkey deer duck goose chicken "
    "eagle owl frog snake whale shark dolphin spider bee ant camel zebra"
)
_TOOLS = (
    "hammer saw drill wrench screwdriver shovel rake axe knife scissors ladder bucket broom mop needle brush pliers "
    "chisel clamp file pump lamp rope nail bolt torch anvil lever wheel pulley crane plow"
)
ANIMALS, TOOLS = _ANIMALS.split(), _TOOLS.split()
