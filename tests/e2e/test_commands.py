"""The commands as a person meets them: a small run from start to end, and one clear message for each mistake."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from mpd_jax import cli
from mpd_jax.eval.samples import read_samples
from mpd_jax.train.records import read_trajectories
from tests.e2e.tiny import QUICKSTART, ROOT, SMALL


def command(capsys, *words: object) -> tuple[int, str, str]:
    """Runs `mpd-jax words` in this process: (exit code, standard output, standard error)."""
    argv, sys.argv = sys.argv, ["mpd-jax", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SHAPES = []  # of the batches that the run of these tests trained on, step by step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    from mpd_jax import build, config, run

    def noted(*words):
        batch = batch_to_train_on(*words)
        SHAPES.append(tuple(np.shape(array) for array in batch))
        return batch

    path, batch_to_train_on = tmp_path_factory.mktemp("runs") / "mpd", build.batch_to_train_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "batch_to_train_on", noted)
        run.train(config.load(QUICKSTART, [*SMALL, f"run.dir={path}"]))
    return path


def test_a_run_directory_holds_what_it_should(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "trajectories", "checkpoints", "evaluations", "summary.json"}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run_dir / "summary.json").read_text())
    wanted = {"accuracy", "accuracy_ci", "mean_tokens", "mean_tokens_ci", "n", "samples_per_problem", "temperature"}
    for side in ("before", "after"):
        assert summary[side].keys() >= wanted | {"grader"}
        assert summary[side]["n"] == 8 and summary[side]["grader"]
    assert summary["peak_memory_bytes"] > 0
    assert {"write", "rewrite", "train"} <= summary["seconds"].keys()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(sum(row["verdicts"].values()) == 8 for row in rows)
    shares = [[row[f"{phase}_share"] for phase in ("load", "write", "rewrite", "train")] for row in rows]
    assert all(abs(sum(of_step) - 1) < 1e-5 for of_step in shares)
    assert [row["compilations"] for row in rows] == [int(SHAPES.index(s) == i) for i, s in enumerate(SHAPES)]
    assert summary["compilations"] == len(set(SHAPES))


def test_the_same_command_again_changes_nothing(run_dir, capsys):
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert command(capsys, "train", QUICKSTART, *SMALL, f"run.dir={run_dir}")[0] == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_export_sample_and_regrade_use_the_trained_student(run_dir, tmp_path, capsys):
    assert command(capsys, "export", run_dir, tmp_path / "out")[0] == 0
    code, _, error = command(capsys, "export", run_dir, tmp_path / "out")
    assert code == 2 and str(tmp_path / "out") in error
    words = ("sample", run_dir, "--prompt", "Leo has 3 pens. Mon: Leo buys 2 more.", "--max-tokens", "12", "--json")
    code, out, _ = command(capsys, *words)
    answer = json.loads(out)
    assert code == 0 and len(answer["response_ids"]) == len(answer["logprobs"]) <= 12
    assert answer["finish_reason"] in ("stop", "length") and all(value <= 0 for value in answer["logprobs"])
    assert json.loads(command(capsys, *words)[1]) == answer
    before = json.loads(command(capsys, "sample", "tiny:student", *words[2:])[1])
    assert "before" not in before and before.pop("prompt_ids") == answer["prompt_ids"]
    assert answer["before"] == before and before["logprobs"] != answer["logprobs"]
    assert command(capsys, "eval", run_dir, "--regrade", "rules")[0] == 0


def test_a_report_of_a_run_lays_what_was_trained_on_beside_what_was_learnt(run_dir, tmp_path, capsys):
    code, _, said = command(capsys, "report", run_dir, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert code == 0 and "wrote" in said and "What is missing" not in page
    answers = read_samples(run_dir / "evaluations" / "training problems, step 2.jsonl")
    asked = {sample.problem_id for sample in answers}
    assert {sample.problem_set for sample in answers} == {"training problems"}  # in no table with held-out ones
    made = [read_trajectories(run_dir / "trajectories" / f"step_00000{n}.jsonl.gz")[1] for n in (0, 1)]
    assert asked and asked <= {t.problem_id for step in made for t in step}
    known = re.findall(r'data-source="trained on" data-verdict="\w+" data-level="\w*" data-change="(?!not known)', page)
    assert len(known) == len(asked)


def test_a_checkpoint_before_the_newest_is_used_where_it_is_asked_for(run_dir, tmp_path, capsys):
    exported = {}
    for step in (1, 2):
        out = tmp_path / str(step)
        code, _, said = command(capsys, "export", run_dir, out, "--dtype", "float32", "--step", step)
        assert code == 0 and f"after step {step}" in said
        exported[step] = load_file(out / "model.safetensors")
    assert any(np.any(exported[1][name] != exported[2][name]) for name in exported[1])
    assert command(capsys, "export", run_dir, tmp_path / "newest", "--dtype", "float32")[0] == 0
    for name, tensor in load_file(tmp_path / "newest" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, exported[2][name])
    for words in (["export", run_dir, tmp_path / "none"], ["sample", run_dir, "--prompt", "1+1?"], ["eval", run_dir]):
        code, _, error = command(capsys, *words, "--step", 7)
        assert code == 2 and "--step: 7 is no checkpoint" in error and "steps: 1, 2" in error
        code, _, error = command(capsys, *words, "--best")
        assert code == 2 and "--best: no checkpoint" in error and "no train.keep_best" in error and "1, 2" in error


def test_what_is_no_training_is_refused_as_one_of_several_processes(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    for words in (["export", run_dir, tmp_path / "out"], ["sample", run_dir, "--prompt", "1+1?"], ["eval", run_dir]):
        code, _, error = command(capsys, *words)
        assert code == 2 and f"mpd-jax {words[0]}: it was started as one process of several" in error


@pytest.mark.slow
def test_an_adapter_is_trained_and_exported_alone_and_merged(tmp_path, capsys):
    """Against its own switched-off self, so that no teacher is loaded; merged by hand from the exported adapter."""
    from mpd_jax import config, roles, run

    path = tmp_path / "lora"
    overrides = ["student.lora={rank: 4, alpha: 8, target_modules: [o_proj, up_proj]}", "recipe.rewrite={how: nobody}"]
    overrides += ["recipe.target={weights: self_frozen, context: concise}", "eval.concise_row=false"]
    run.train(config.load(QUICKSTART, [*SMALL, *overrides, f"run.dir={path}"]))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [row["finite"] for row in rows] == [True, True] and rows[0]["grad_norm"] > 0
    assert command(capsys, "export", path, tmp_path / "merged", "--dtype", "float32")[0] == 0
    assert command(capsys, "export", path, tmp_path / "adapter", "--adapter")[0] == 0
    base = load_file(roles.TINY / "student" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"o_proj", "up_proj"} and base.keys() == merged.keys()
    for name, held in merged.items():
        start = base[name].astype(np.float32)
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            added = 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            assert np.abs(added).max() > 1e-5
            start = start + added
        np.testing.assert_allclose(held, start, rtol=0, atol=1e-6, err_msg=name)


def test_no_adapter_is_exported_of_a_run_that_trained_all_weights(run_dir, tmp_path, capsys):
    code, _, error = command(capsys, "export", run_dir, tmp_path / "adapter", "--adapter")
    assert code == 2 and "--adapter" in error and "trained all weights" in error


@pytest.mark.slow
def test_the_papers_config_shrunk_by_overrides_alone_runs_on_eight_devices(tmp_path):
    """configs/mpd.yaml: adapter, bfloat16, clipping, fsdp over all devices; its models and sizes made smaller."""
    from mpd_jax import config, run, trees

    contexts = trees.read_yaml(QUICKSTART)["recipe"]["contexts"]  # the wordings that the shipped models know
    smaller = [
        f"recipe.contexts={json.dumps(contexts)}",
        "student.path=tiny:student",
        "student.revision=null",
        "teacher.path=tiny:teacher",
        "teacher.revision=null",
        "problems={train: tiny, heldout: tiny}",
        "sampling.writer.max_tokens=192",
        "sampling.rewriter.max_tokens=64",
        "sampling.prompt_tokens=160",
        "sampling.prefill_chunk=32",
        "train.steps=2",
        "train.save_every=1",
        "train.max_length=320",
        "eval.problems=4",
        "eval.attempts=1",
        "eval.max_tokens=32",
    ]
    run.train(config.load(ROOT / "configs" / "mpd.yaml", [*smaller, f"run.dir={tmp_path}/mpd"]))
    rows = [json.loads(line) for line in (tmp_path / "mpd" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["finite"] and row["grad_norm"] > 0 and row["trained"] >= 4 for row in rows)
    summary = json.loads((tmp_path / "mpd" / "summary.json").read_text())
    assert summary["versions"]["device"] == "8 x cpu" and summary["after"]["n"] == 4


@pytest.mark.slow
def test_training_brings_the_student_nearer_to_its_target(tmp_path):
    """The same eight problems and texts at every step, so that nothing but the weights changes."""
    from mpd_jax import config, run
    from mpd_jax.tiny_world.generator import train_problems

    lines = [json.dumps(vars(problem)) for problem in train_problems(8, seed=0)]
    (tmp_path / "eight.jsonl").write_text("\n".join(lines))
    overrides = [f"problems.train={tmp_path}/eight.jsonl", "recipe.write.by=dataset", "recipe.rewrite={how: nobody}"]
    overrides += ["train.steps=12", "train.warmup_steps=3", "eval.problems=1", "eval.concise_row=false"]
    run.train(config.load(QUICKSTART, [*SMALL, *overrides, f"run.dir={tmp_path}/run"]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    divergence = [row["divergence"] for row in rows]
    assert divergence[-1] < 0.95 * divergence[0], divergence
    assert sum(b < a for a, b in itertools.pairwise(divergence)) >= 9, divergence


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such file"),
        (["train", QUICKSTART, "train.stpes=1"], "did you mean train.steps"),
        (["train", QUICKSTART, "student.path=/nowhere"], "/nowhere"),
        (["train", QUICKSTART, f"student.path={ROOT}"], "config.json"),
        (["train", QUICKSTART, "student.path=tiny:giant"], "tiny:student and tiny:teacher"),
        (["train", QUICKSTART, "problems.train=absent.jsonl"], "absent.jsonl"),
        (["train", QUICKSTART, "recipe.target.weights=none"], "recipe.loss.kind"),
        (["train", QUICKSTART, "mesh.tensor=3"], "mesh"),
        (["train", QUICKSTART, "sampling.writer.max_tokens=5000"], "window"),
        (["train", QUICKSTART, "--processes", "2"], "--coordinator and --process-id: missing"),
        (
            ["train", QUICKSTART, "--coordinator", "host0:9000", "--processes", "2", "--process-id", "2"],
            "--process-id: 2 is not allowed with --processes 2; number them from 0 to 1",
        ),
        (["eval", "tiny:giant"], "tiny:student"),
        (["eval", "tiny:student", "--step", "3"], "--step: tiny:student is no run directory"),
        (["sample", "tiny:student", "--prompt", "1+1?", "--best"], "--best: tiny:student is no run directory"),
        (["export", ROOT, "out", "--best", "--step", "3"], "--step: 3 and --best"),
        (["eval", "tiny:student", "--out", "/proc/nowhere/out"], "--out: /proc/nowhere/out"),
        (["sample", "tiny:student", "--json"], "--json"),
        (["sample", "x" * 300, "--prompt", "1+1?"], "name too long"),
        (["sample", "tiny:student", "--prompt", "1+1? " * 3000], "--prompt: "),
        (["sample", "tiny:student", "--prompt", "1+1?", "--temperature", "1e-20"], "temperature = 1e-20"),
        (["train", QUICKSTART, "eval.max_tokens=100000"], "eval"),
        (["train", QUICKSTART, "run.dir=2026-13-45"], "run.dir=2026-13-45"),
        (["export", ROOT, "out"], "config.json"),
        (["export", "tiny:student", "out", "--adapter"], "--adapter: tiny:student is no run directory"),
        (["export", "tiny:student", "out", "--best"], "--best: tiny:student is no run directory"),
        (["config", QUICKSTART, "eval.grader=guess"], "eval.grader"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(capsys, *words)
    assert code == 2, error
    assert said in error and "Traceback" not in error


def test_the_prompts_of_every_role_are_printed_as_they_are_read(tmp_path, capsys):
    said = {"question": "What is 7+8?", "answer": "15"}
    drafts = {"Draft:\n7+8=15.\n\n\\boxed{15}\nFix": {"response": "<think>7+8=15.</think>\\boxed{15}"}}
    drafts["Draft:\n[the draft stands here]\nFix"] = {}
    for draft, response in drafts.items():
        (tmp_path / "train.jsonl").write_text(json.dumps({**said, **response}) + "\n")
        repair = ["recipe.rewrite.how=repair", "recipe.target.context=rewrite", "rewriter={path: 'tiny:student'}"]
        words = ["config", QUICKSTART, *repair, f"problems.train={tmp_path / 'train.jsonl'}", "--prompts"]
        code, out, _ = command(capsys, *words)
        heads = [line.split(":")[0].strip("= ") for line in out.splitlines() if line.startswith("===")]
        roles = ["student, who writes, plain", "target (teacher), repair", "rewriter, repair"]
        assert code == 0 and heads == [*roles, "student, concise", "student, privileged"]
        assert out.count(f"What is 7+8?\n{draft}") == 2 and "<|im_start|>user\nBe brief. What is 7+8?<|im_end|>" in out


def test_a_model_is_exported_with_its_head_untied(tmp_path, capsys):
    assert command(capsys, "export", "tiny:student", tmp_path / "untied", "--untie")[0] == 0
    tensors = load_file(tmp_path / "untied" / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert not json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"]


def test_mismatched_tokenizers_are_refused(tmp_path, capsys):
    from mpd_jax.roles import TINY

    other = tmp_path / "other"
    other.mkdir()
    for path in (TINY / "teacher").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[40:42]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, error = command(capsys, "train", QUICKSTART, f"teacher.path={other}", f"run.dir={tmp_path / 'run'}")
    assert code == 2 and "teacher.path" in error and "Traceback" not in error


def test_another_config_in_the_same_directory_is_refused(run_dir, capsys):
    code, _, error = command(capsys, "train", QUICKSTART, *SMALL, f"run.dir={run_dir}", "run.seed=5")
    assert code == 2 and "run.seed = 5" in error


def test_help_names_every_command(capsys):
    code, out, _ = command(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("train", "eval", "sample", "export", "config", "bench"))


def test_a_full_disk_gives_one_message_and_loses_nothing(run_dir, tmp_path, capsys, monkeypatch):
    import errno
    import os

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    kept = (run_dir / "summary.json").read_bytes()
    monkeypatch.setattr(os, "replace", full)
    code, _, error = command(capsys, "train", QUICKSTART, *SMALL, f"run.dir={run_dir}")
    monkeypatch.undo()
    assert code == 2 and "No space left" in error and "Traceback" not in error
    assert (run_dir / "summary.json").read_bytes() == kept
