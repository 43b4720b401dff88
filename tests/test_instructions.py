"""What a swept instruction is worth by itself: who is loaded and asked. The slow test of test_compare.py trains."""

import dataclasses
import json

from mpd_jax import build, config, samplers
from mpd_jax.eval import instructions
from mpd_jax.eval.samples import Sample, write_samples
from mpd_jax.roles import ModelFiles, open_roles
from mpd_jax.run import BASE, samples_path
from mpd_jax.screen import Screen
from mpd_jax.types import Problem
from tests.e2e.tiny import ROOT
from tests.test_write import StubSampler


class Loaded(StubSampler):
    loaded = ()

    def load(self, weights, version):
        self.loaded = (*self.loaded, (weights, version))


def test_a_rewriter_on_the_mesh_is_asked_whoever_serves_the_student(tmp_path, monkeypatch):
    asked = [Problem(f"p{i}", f"What is {i}+1?", str(i + 1)) for i in range(2)]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in asked))
    words = ["student.serve=http://127.0.0.1:9", f"run.dir={tmp_path}", "eval.temperatures=[1.0]"]
    c = config.load(str(ROOT / "configs" / "tiny" / "mpd.yaml"), [*words, f"problems.heldout={tmp_path}/two.jsonl"])
    roles = open_roles(c)
    chat = roles.student.chat
    drafts = [
        Sample(
            name=BASE,
            context="plain",
            temperature=1.0,
            problem_id=problem.id,
            attempt=0,
            reference=problem.answer or "",
            response_ids=chat.encode("<think>\nOne more.\n</think>\n\n1"),
            text="",
            tokens=99,
            reasoning_tokens=90,
            max_tokens=256,
            ended="stopped",
            correct=True,
            grader="rules",
            extracted=problem.answer,
            failure=None,
            answer="",
        )
        for problem in asked
    ]
    write_samples(samples_path(tmp_path, BASE), drafts)
    end = chat.decode(chat.end)
    sampler = Loaded(chat, *(f"It is {p.answer}.\n####\n\\boxed{{{p.answer}}}{end}" for p in asked))
    monkeypatch.setattr(samplers, "make_sampler", lambda files, *_: sampler)
    monkeypatch.setattr(ModelFiles, "weights", lambda files, mesh: files.key)
    found = instructions._rewrites(c, roles, build.make_mesh(c.mesh), Screen())
    assert sampler.loaded == (("teacher", 0),) and len(sampler.requests) == 2
    assert found["1"].accuracy.mean == 1.0 and 0 < found["1"].tokens < 30
