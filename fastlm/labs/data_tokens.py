"""Short texts that the tokens lab cuts: the same two paragraphs and the same sentence in Korean and English."""

TEXT = {
    "ko": (
        "강가의 작은 마을에 오래된 도서관이 있습니다. 비가 오는 날이면 사람들은 젖은 우산을 문 앞에 세워 두고 조용히 "
        "책을 읽습니다. 도서관을 지키는 윤 선생님은 아침마다 난로에 불을 피웁니다.\n\n어느 봄날, 선생님은 책을 읽는 "
        "기계를 한 대 들여놓았습니다. 기계는 글을 작은 조각으로 자르고, 조각마다 번호를 붙였습니다. "
        '아이들이 물었습니다. "왜 통째로 읽지 않아요?" 선생님이 웃으며 대답했습니다. "처음 보는 낱말도 읽어야 하니까."'
    ),
    "en": (
        "There is an old library in a small town by the river. On rainy days people leave their wet umbrellas at the "
        "door and read in silence. Ms. Yun, who looks after the library, lights the stove every morning.\n\nOne day "
        "in spring she brought in a machine that reads. It cut the text into small pieces and gave each piece a "
        'number. The children asked, "Why does it not read the words whole?" She smiled and answered, "Because it must '
        'also read words it has never seen."'
    ),
}
SENTENCE = {"ko": "기계는 처음 보는 낱말도 읽습니다.", "en": "The machine also reads words it has never seen."}
