import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks.gold_answers import champ
from cluster.config import Plugin, TasksSection
from cluster.errors import ConfigError
from cluster.types import Task
from rewards.champ_taskset import ChampTaskset
from rewards.table_taskset import FileTaskset, HubTaskset
from rewards.tasksets import load_tasks


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def section(path: str, eval_path: str | None = None, **values: Any) -> TasksSection:
    def plugin(at: str) -> Plugin:
        return Plugin(use="file", settings={"path": at})

    return TasksSection(train=plugin(path), eval=plugin(eval_path) if eval_path else None, **values)


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 =", "answer": i + 1} for i in range(start, start + count)]


FULL_ROW = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}],
    "answer": "4",
    "hints": ["It is even.", "It is 2 * 2."],
    "solution": "2 + 2 = 4",
    "tests": ["assert f() == 4"],
    "tags": ["sum"],
    "id": 17,
    "source": "ignored",
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_with_every_column_becomes_a_task(tmp_path: Path, suffix: str):
    path = tmp_path / f"sums.{suffix}"
    if suffix == "jsonl":
        write(path, [FULL_ROW])
    else:
        parquet.write_table(pa.Table.from_pylist([FULL_ROW]), path)
    (task,) = FileTaskset(str(path)).load()
    assert [m.role for m in task.messages] == ["system", "user"]
    assert (task.reference, task.solution) == ("4", "2 + 2 = 4")
    assert task.hints == FULL_ROW["hints"]
    assert task.tags == ["sum", "id:17"]
    assert json.loads(task.entry) == {"tests": ["assert f() == 4"]}
    assert task.taskset == "sums"


def test_a_dataset_folder_loads_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, rows in (("train", sums(3)), ("test", sums(1, start=9))):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    train, test = (HubTaskset(str(folder), split=split).load() for split in ("train", "test"))
    assert [task.reference for task in train] == ["1", "2", "3"]
    assert [(task.messages[0].content, task.taskset) for task in test] == [("9 + 1 =", "sums")]
    with pytest.raises(ConfigError, match=r"split validation: could not be loaded"):
        HubTaskset(str(folder), split="validation").load()


def test_a_hub_that_cannot_be_reached_blames_the_dataset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plugin = Plugin(use="hub", settings={"dataset": "no-such-owner/no-such-sums"})
    with pytest.raises(ConfigError, match=r"tasks\.train: dataset: no-such-owner/no-such-sums"):
        load_tasks(TasksSection(train=plugin), "train")


def test_columns_may_be_renamed_and_numbers_are_references(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"question": "1 + 1 =", "result": 2}])
    (task,) = FileTaskset(path, prompt="question", answer="result").load()
    assert (task.messages[0].content, task.reference) == ("1 + 1 =", "2")


def test_the_id_is_the_content(tmp_path: Path):
    first = FileTaskset(write(tmp_path / "a.jsonl", sums(2))).load()
    again = FileTaskset(write(tmp_path / "b.jsonl", sums(2))).load()
    assert [t.task_id for t in first] == [t.task_id for t in again]
    assert first[0].task_id != first[1].task_id


def test_every_bad_line_is_named_with_its_column(tmp_path: Path):
    rows = [
        sums(1)[0],
        {"prompt": "x"},
        {"answer": 1},
        {"prompt": 5, "answer": 1},
        {"prompt": "x", "answer": {"a": 1}},
        {"prompt": "x", "answer": 1, "hints": "one"},
        {"prompt": [{"role": "user"}], "answer": 1},
        "{not json",
        "[1]",
    ]
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ConfigError) as error:
        FileTaskset(path).load()
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == [str(n) for n in range(2, 10)]
    columns = ["answer", "prompt", "prompt", "answer", "hints", "prompt"]
    for line, column in zip(lines, columns, strict=False):
        assert line.startswith(f"{path}:")
        assert f"column {column!r}" in line


def test_long_lists_of_problems_are_cut(tmp_path: Path):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "x"}] * 30)
    with pytest.raises(ConfigError, match="and 20 more"):
        FileTaskset(path).load()


@pytest.mark.parametrize("name", ["absent.jsonl", "tasks.csv"])
def test_unusable_paths_blame_the_setting(tmp_path: Path, name: str):
    (tmp_path / "tasks.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"tasks\.train: path"):
        load_tasks(section(str(tmp_path / name)), "train")


def test_a_tail_is_held_out_and_never_trained_on(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", sums(50))
    train, held_out = (load_tasks(section(path), split) for split in ("train", "eval"))
    assert (len(train), len(held_out)) == (45, 5)
    assert not ids(train) & ids(held_out)


def test_the_held_out_tail_has_a_limit(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", sums(3000))
    assert len(load_tasks(section(path), "eval")) == 200


def test_overlap_with_eval_is_dropped_from_train(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    same_prompt_other_answer = [{"prompt": "3 + 1 = ", "answer": "four"}]
    train_path = write(tmp_path / "a.jsonl", sums(20) + same_prompt_other_answer)
    eval_path = write(tmp_path / "b.jsonl", sums(10))
    with caplog.at_level("INFO"):
        train = load_tasks(section(train_path, eval_path), "train")
    assert {t.messages[0].content for t in train} == {f"{i} + 1 =" for i in range(10, 20)}
    assert "11 tasks dropped" in caplog.text
    assert len(load_tasks(section(train_path, eval_path), "eval")) == 10


def test_duplicates_are_dropped(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", sums(10) + sums(10))
    eval_path = write(tmp_path / "b.jsonl", sums(1, start=99))
    assert len(load_tasks(section(path, eval_path), "train")) == 10


@pytest.mark.parametrize("rows", [[], sums(1)])
def test_too_few_tasks_are_refused(tmp_path: Path, rows: list[Any]):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r"tasks\.train: must hold at least"):
        load_tasks(section(path), "train")


def test_nothing_left_to_train_on_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", sums(5))
    with pytest.raises(ConfigError, match="none is left"):
        load_tasks(section(path, path), "train")


def test_the_system_prompt_comes_first_unless_a_task_has_its_own(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [*sums(9), FULL_ROW])
    both = section(path, system_prompt="Think.")
    train, (own,) = load_tasks(both, "train"), load_tasks(both, "eval")
    assert [(m.role, m.content) for m in train[0].messages] == [
        ("system", "Think."),
        ("user", "0 + 1 ="),
    ]
    assert [m.content for m in own.messages] == ["Be brief.", "2 + 2 ="]
    assert ids(train) == ids(load_tasks(section(path), "train"))


def ids(tasks: list[Task]) -> set[str]:
    return {task.task_id for task in tasks}


CHAMP = {
    "problems": {
        "P_1": {
            "_text": "How many?", "_answer": "7", "category": "Sequence",
            "ch_list": ["H_1", "C_1", "H_1", "H_2"], "solution": {"steps": [{"_text": "So 7."}]},
        },
        "P_2": {
            "_text": "Which?", "_answer": "n + 1", "category": "Inequality", "ch_list": [],
            "solution": {"steps": []},
        },
    },
    "hints": {"H_1": {"_text": "Count."}, "H_2": {"_text": "It is 7."}},
    "concepts": {"C_1": {"_text": "Each adds one."}},
}  # fmt: skip


async def test_champ_gives_a_ladder_of_hints_short_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A package as `champ-dataset` lays its data out."""
    with pytest.raises(ConfigError, match="pip install --no-deps champ-dataset"):
        ChampTaskset().load()
    assert (await champ()).verdict == "not shown here"
    (tmp_path / "champ_dataset" / "dataset_files").mkdir(parents=True)
    (tmp_path / "champ_dataset" / "__init__.py").touch()
    (tmp_path / "champ_dataset" / "dataset_files" / "v0.json").write_text(json.dumps(CHAMP))
    monkeypatch.syspath_prepend(tmp_path)
    (task,) = ChampTaskset(prompt="{question} Think.").load()
    assert task.messages[0].content == "How many? Think."
    assert task.hints == ["Count.", "Count.\nEach adds one."]
    assert (task.reference, task.solution, task.tags) == ("7", "So 7.", ["Sequence"])
    assert len(ChampTaskset(numbers_only=False).load()) == 2
    with pytest.raises(ConfigError, match=r"categories: no Algebra in Inequality, Sequence"):
        ChampTaskset(categories=["Algebra"]).load()
    shown = await champ()
    assert (shown.verdict, shown.measured[:6]) == ("holds", "0 of 1"), shown.why
