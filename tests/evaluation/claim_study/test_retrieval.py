import re

import pytest

from phsa_megatron.evaluation.claim_study.retrieval import (
    DEPTHS,
    LANGUAGES,
    NUM_DIGITS,
    TASKS,
    RetrievalText,
    sentences,
)

NUMBER = re.compile(r"\d{4}")
FILLER = {
    "english": [f"The {w} went over the hill and saw the sea." for w in ("fox", "hen", "cow", "cat", "owl")],
    "chinese": [f"那只{w}走过山坡，看见了大海。" for w in "狐母公猫狗鹰"],
}


def maker(language):
    return RetrievalText(language, FILLER[language] * 40, lambda text: len(text.split()) + len(text) // 8)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_in_the_text_once_more_and_at_the_asked_depth(language, task):
    for depth in DEPTHS:
        trial = maker(language).trial(task, 400, depth, seed=7, number=0)
        answer = trial.text[-NUM_DIGITS:]
        places = [m.start() for m in NUMBER.finditer(trial.text) if m.group() == answer]
        assert len(places) == 2 and places[1] == len(trial.text) - NUM_DIGITS
        assert abs(places[0] / len(trial.text) - depth) < 0.15
        numbers = set(NUMBER.findall(trial.text))
        assert len(numbers) == (8 if task == "multi_key" else 1)


def test_a_chain_is_followed_to_its_end():
    text = maker("english").trial("variable_tracking", 400, 0.5, 7, 3).text
    refers = dict(re.findall(r"locker of the (\w+ \w+) opens like the locker of the (\w+ \w+)\.", text))
    (first, number), *_ = re.findall(r"locker of the (\w+ \w+) opens with (\d{4})", text)
    asked = re.search(r"Now answer\. The locker of the (\w+ \w+) opens", text).group(1)
    assert refers[refers[asked]] == first and text.endswith(number)


def test_documents_ask_for_all_their_names_and_depend_on_seed_and_number_alone():
    text = maker("english").document(1, 5, 400)
    assert text == maker("english").document(1, 5, 400)
    assert text not in (maker("english").document(2, 5, 400), maker("english").document(1, 6, 400))
    facts = re.findall(r"(?<!answer\. )The locker of the (\w+ \w+) opens", text)
    asked = re.findall(r"answer\. The locker of the (\w+ \w+) opens", text)
    assert sorted(facts) == sorted(asked)


def test_documents_ask_for_more_where_there_is_room_and_for_no_more_than_a_fact_in_64_tokens():
    made = maker("english")
    asked = {
        length: [made.document(3, n, length).count("Now answer.") for n in range(60)]
        for length in (192, 2000)
    }
    assert max(asked[192]) == 3
    assert sum(asked[2000]) / 60 > 3 and 16 < max(asked[2000]) <= 31


def test_trials_use_other_random_numbers_than_training():
    documents = {maker("english").document(7, n, 400) for n in range(20)}
    assert maker("english").trial("single", 400, 0.5, 7, 0).text not in documents


def test_length_is_kept():
    made = maker("english")
    for length in (200, 400, 800):
        text = made.trial("single", length, 0.5, 7, 0).text
        tokens = len(text.split()) + len(text) // 8
        assert 0.8 * length < tokens <= length


def test_sentences_are_cut_at_their_ends():
    text = "One bird flew away. Two birds came back!\n\nNo."
    assert sentences(iter([text]), "english") == ["One bird flew away.", "Two birds came back!"]
    found = sentences(iter(["第一句话说完了吧。第二句话也说完了！"]), "chinese")
    assert found == ["第一句话说完了吧。", "第二句话也说完了！"]


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no sentence of english"):
        RetrievalText("english", [], len)
