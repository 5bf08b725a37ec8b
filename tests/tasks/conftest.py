"""What the tests of real questions share: a folder in a data set's format, and the configuration that reads it."""

import json

import pytest


@pytest.fixture
def data(tmp_path):
    """`data(split, rows)` writes a file of the folder `data.folder`, a row a line."""

    def write(split: str, rows: list) -> None:
        write.folder.mkdir(exist_ok=True)
        (write.folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    write.folder = tmp_path / "data"
    return write


@pytest.fixture
def ask_real(tiny, data):
    """`ask_real(task, row, ...)`: thirty training and ten test questions, `row(i)` each, and what asks for them."""

    def make(task: str, row, **own):
        data("train", [row(i) for i in range(30)])
        data("test", [row(i) for i in range(30, 40)])
        sizes = {"task": task, "data": str(data.folder), "n_train": 16, "n_val": 8, "n_test": 10, "val_samples": 8}
        return lambda **changes: tiny(**(sizes | own | changes))

    return make
