"""Writes problems as tensorflow-datasets keeps them, array_record files and what describes them, without TensorFlow.

python -m tests.tfds_files    makes tests/data/ten.jsonl and tests/data/tfds anew, of ten problems of the tiny world.
"""

import json
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent / "data"


def write(directory: Path, name: str, rows: Sequence[dict]) -> None:
    """A set of one split, train, under `directory`/`name`/1.0.0. Texts and whole numbers are kept as such."""
    import numpy as np
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    kinds = {str: tfds.features.Text(), int: tfds.features.Scalar(np.int64)}
    features = tfds.features.FeaturesDict({key: kinds[type(value)] for key, value in rows[0].items()})
    place = directory / name / "1.0.0"
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{name}-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for row in rows:
        writer.write(features.serialize_example(features.encode_example(row)))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=place, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(rows)], num_bytes=file.stat().st_size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=place, features=features, split_infos=[split], filename_template=template
    )


def ten() -> list[dict]:
    from mpd_jax.tiny_world import generator

    problems = generator.heldout_problems(10, seed=1)
    return [
        {
            "id": problem.id,
            "question": problem.question,
            "answer": problem.answer,
            "response": problem.response,
            "level": len(problem.question.split(":")),
            "subject": "coins",
        }
        for problem in problems
    ]


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    (HERE / "ten.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ten()))
    write(HERE / "tfds", "ten", ten())
