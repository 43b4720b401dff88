"""The files of a small run, as training would have left them, for the tests of the report."""

import json
from pathlib import Path

from mpd_jax import config
from mpd_jax.eval.figures import rows_of
from mpd_jax.eval.samples import Sample, write_samples
from mpd_jax.train.records import Records
from mpd_jax.types import Problem, Trajectory

ROOT = Path(__file__).parent.parent
PROBLEMS = [Problem(f"p{i}", f"Leo has {i} coins. Mon: Leo finds 5 more.", str(i + 5)) for i in range(8)]


def sample(name: str, i: int, tokens: int, correct: bool, text: str | None = None, temperature: float = 1.0) -> Sample:
    answer = f"\\boxed{{{i + 5 if correct else 0}}}"
    return Sample(
        name=name,
        context="concise" if "concise" in name else "plain",
        temperature=temperature,
        problem_id=f"p{i}",
        attempt=0,
        reference=str(i + 5),
        response_ids=(1,) * 3,
        text=text if text is not None else f"<think>\nLeo starts with {i}, and so on.\n</think>\n\n{answer}",
        answer=answer,
        tokens=tokens,
        reasoning_tokens=tokens - 10,
        max_tokens=256,
        ended="stopped",
        extracted="0",
        correct=correct,
        grader="rules",
        failure=None,
    )


def evaluated(run_dir: Path, name: str, samples: list[Sample]) -> None:
    """An evaluation's two files."""
    write_samples(run_dir / "evaluations" / f"{name}.jsonl", samples)
    head = {"rows": [row.summary() for row in rows_of(samples)], "seconds": 1.0}
    (run_dir / "evaluations" / f"{name}.json").write_text(json.dumps(head))


def metrics(steps: int) -> str:
    rows = [
        {
            "step": step,
            "loss": 0.5 - 0.1 * step,
            "written_tokens": 100.0 - step,
            "response_tokens": 40.0,
            "student_entropy": 0.2,
            "verdicts": {"kept": 3, "longer": 1},
            "divergence_by_position": [{"from": 0, "tokens": 4, "mean": 0.1}, {"from": 4, "tokens": 8, "mean": 0.7}],
            **{f"{phase}_share": share for phase, share in (("write", 0.2), ("rewrite", 0.5), ("train", 0.3))},
        }
        for step in range(steps)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(run_dir: Path, encode, *, steps: int = 2, saved: int = 60) -> Path:
    """encode: text to ids, of the student's tokenizer. saved: tokens that training saves."""
    run_dir.mkdir(parents=True)
    settings = config.load(
        ROOT / "configs" / "quickstart.yaml", [f"run.dir={run_dir}", f"train.steps={steps}", "train.warmup_steps=0"]
    )
    (run_dir / "config.yaml").write_text(config.to_yaml(settings))
    (run_dir / "metrics.jsonl").write_text(metrics(steps))
    records = Records(run_dir, seed=0)
    for step in range(len(PROBLEMS) // 4):
        records.save(step, [trajectory(i, encode) for i in range(4 * step, 4 * step + 4)])
    evaluated(run_dir, "base", [sample("base", i, 120 + i, i % 2 == 0) for i in range(8)])
    trained = [sample(f"trained, step {steps}", i, 120 + i - saved, i % 4 != 3) for i in range(8)]
    evaluated(run_dir, f"trained, step {steps}", trained)
    examples = [sample(f"training problems, step {steps}", i, 50, True) for i in range(6)]
    evaluated(run_dir, f"training problems, step {steps}", examples)
    summary = {"rows": [{**rows_of(trained)[0].summary(), "name": "base, cut at 70"}], "versions": {"jax": "0"}}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


def trajectory(i: int, encode) -> Trajectory:
    prompt = encode(PROBLEMS[i].question)
    long, short = (
        encode(f"<think>\n{t}\n</think>\n\n\\boxed{{{i + 5}}}") for t in (f"so {i}+5={i + 5}. " * 4, f"{i + 5}")
    )
    original = Trajectory(f"p{i}", 0, prompt, long, "student", 0, "stopped")
    verdict = "kept" if i % 4 else "longer"
    return Trajectory(f"p{i}", 0, prompt, short, "teacher", 0, "assembled", verdict, i % 4 == 0, original)
