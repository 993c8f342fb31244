"""What the attention lab reads, the same in Korean and English: sentences, and a list of words to repeat."""

SENTENCES = {
    "ko": (
        "민수는 도서관에서 빌린 책을 다 읽고 나서 그 책을 돌려주었다.",
        "비가 오는 날이면 할머니는 우산을 들고 버스 정류장에 나와 계셨다.",
        "고양이가 창문 옆에서 자는 동안 아이들은 조용히 그림을 그렸다.",
        "어제 산 빵은 너무 딱딱해서 우유에 찍어 먹어야 했다.",
        "선생님은 학생들에게 내일까지 숙제를 내라고 말씀하셨다.",
        "산에 오르는 길은 힘들었지만 꼭대기에서 본 바다는 아름다웠다.",
    ),
    "en": (
        "When Minsu had read the book that he borrowed from the library, he returned the book.",
        "On rainy days my grandmother waited at the bus stop with an umbrella.",
        "While the cat slept by the window, the children quietly drew pictures.",
        "The bread that I bought yesterday was so hard that I had to dip it in milk.",
        "The teacher told the students to hand in their homework by tomorrow.",
        "The way up the mountain was hard, but the sea seen from the top was beautiful.",
    ),
}
LIST = {
    "ko": " 사과 바다 책 구름 기차 연필 달 모자",
    "en": " apple sea book cloud train pencil moon hat",
}
