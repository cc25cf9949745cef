"""LongBench's metrics on answers whose scores were worked out by hand, and its reader on hand-made files."""

import json

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.tasks import longbench
from phsa_megatron.evaluation.tasks import longbench_metrics as metrics

CLASSES = ["Food", "Food, drink", "City", "Other city"]


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        # Words: {red, canoe, by, lake} against {red, canoe, on, lake}: 3 of 4 and 3 of 4.
        (metrics.qa_f1, "The red canoe, by a lake!", "a Red canoe on the lake", 0.75),
        (metrics.qa_f1, "no", "yes", 0.0),
        (metrics.qa_f1, "", "yes", 0.0),
        # 1 word of 2, and it is all of the reference: 2 * 0.5 * 1 / 1.5.
        (metrics.qa_f1, "Paris France", "paris", 2 / 3),
        (metrics.classification, "It is City.", "City", 1.0),
        # "Food" is a part of the right class and does not count as named.
        (metrics.classification, "Food, drink", "Food, drink", 1.0),
        # "City" and "Food" are named, one of them rightly.
        (metrics.classification, "City or Food", "City", 0.5),
        (metrics.classification, "Other", "City", 0.0),
        (metrics.retrieval, "Paragraph 7", "Paragraph 7", 1.0),
        (metrics.retrieval, "Paragraph 7 or 17, 7", "Paragraph 7", 2 / 3),
        (metrics.retrieval, "the last one", "Paragraph 7", 0.0),
        (metrics.retrieval_zh, "段落12", "段落12", 1.0),
        (metrics.retrieval_zh, "段落1", "段落12", 0.0),
        (metrics.count, "There are 5 of 10", "5", 0.5),
        (metrics.count, "none", "5", 0.0),
    ],
)
def test_metrics_without_libraries(metric, answer, reference, score):
    assert metric(answer, reference, CLASSES) == pytest.approx(score, abs=1e-12)


def test_rouge_l_is_of_the_longest_common_subsequence():
    pytest.importorskip("rouge", reason="the extra eval brings it; CI's second leg has it")
    # "red lamp on table": in order, 3 of the answer's 4 words are in the reference of 6: 2 * .75 * .5 / 1.25.
    found = metrics.rouge_l("red table lamp stood", "the red table has a lamp")
    assert found == pytest.approx(0.6, abs=1e-6)
    assert metrics.rouge_l("", "a lamp") == metrics.rouge_l(" ", "a lamp") == 0.0


def test_chinese_metrics_count_words():
    pytest.importorskip("jieba", reason="the extra eval brings it; CI's second leg has it")
    # 北京 是 中国 首都 against 中国 的 首都 是 北京: 4 of 4 and 4 of 5.
    assert metrics.qa_f1_zh("北京是中国首都。", "中国的首都是北京") == pytest.approx(8 / 9)
    assert metrics.qa_f1_zh("上海", "北京") == 0.0
    pytest.importorskip("rouge", reason="the extra eval brings it; CI's second leg has it")
    # In order: 中国 首都 of 北京 是 中国 首都, and of 中国 的 首都 是 北京: 2 * .5 * .4 / .9.
    assert metrics.rouge_l_zh("北京是中国首都", "中国的首都是北京") == pytest.approx(4 / 9, abs=1e-6)


def test_edit_similarity_is_of_the_first_line_that_is_code():
    pytest.importorskip("rapidfuzz", reason="the extra eval brings it; CI's second leg has it")
    # abcd and abxd: 6 of 8 characters are in common.
    assert metrics.edit_similarity("\n# note\nabcd\nrest", "abxd") == 0.75
    assert metrics.edit_similarity("// only a note", "abxd") == 0.0


def write(folder, name, records):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


RECORD = {
    "context": "Ann lives in {Oslo}.",
    "input": "Where does Ann live?",
    "answers": ["Oslo", "in Norway"],
}


def test_the_best_reference_counts_and_only_the_first_line_where_it_says_so():
    assert longbench.score("hotpotqa", "Norway", RECORD) == pytest.approx(2 / 3)
    assert longbench.score("triviaqa", "\nOslo\nQuestion: and so on", RECORD) == 1.0
    assert longbench.score("hotpotqa", "Oslo\nand so on", RECORD) == 0.4


def test_records_are_asked_with_context_and_question(tmp_path, scripted):
    write(tmp_path, "hotpotqa", [RECORD, RECORD | {"answers": ["Rome"]}])
    records = longbench.read(tmp_path, "hotpotqa")
    answerer = scripted(lambda prompt: "Oslo" if "{Oslo}" in prompt else "?")
    prompt = longbench.read_prompts(None)["hotpotqa"]
    assert list(longbench.ask(answerer, "hotpotqa", records, prompt)) == [("Oslo", 1.0), ("Oslo", 0.0)]
    assert all("Where does Ann live?" in text for text in answerer.prompts)
    assert longbench.read(tmp_path, "hotpotqa", limit=1) == [RECORD]


def test_a_prompt_that_is_too_long_loses_its_middle(scripted):
    answerer = scripted(str, max_tokens=200)
    text = "start " + "so and " * 500 + "end"
    cut = longbench.without_middle(answerer, text, 150)
    assert 140 <= len(answerer.encode(cut)) <= 150
    assert cut.startswith("start so") and cut.endswith("and end")
    assert longbench.without_middle(answerer, "short", 150) == "short"


def test_missing_files_are_named_with_source_and_folder(tmp_path):
    with pytest.raises(DataError, match=r"longbench_dir=FOLDER is missing.*hotpotqa.jsonl.*THUDM/LongBench"):
        longbench.read(None, "hotpotqa")
    with pytest.raises(DataError, match=rf"hotpotqa.jsonl not found. Get them from .* into {tmp_path}"):
        longbench.read(tmp_path, "hotpotqa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"context": "", "input": ""}\n', "line 1: no answers"),
        ('{"context": "", "input": "", "answers": []}\n', "line 1: no answers"),
        ("\n", "holds no record"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    (tmp_path / "trec.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        longbench.read(tmp_path, "trec")


def test_prompts_of_ones_own(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('{"trec": "X {context} {input}", "other": "{context}"}', encoding="utf-8")
    prompts = longbench.read_prompts(file)
    assert prompts["trec"] == "X {context} {input}" and set(prompts) == set(longbench.DATASETS)
    file.write_text('{"trec": "no place"}', encoding="utf-8")
    with pytest.raises(DataError, match="trec must be texts with {context}"):
        longbench.read_prompts(file)


def test_every_prompt_of_this_project_has_its_places():
    assert len(longbench.DATASETS) == 21
    for name, dataset in longbench.DATASETS.items():
        assert "{context}" in dataset.prompt, name
