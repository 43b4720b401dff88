"""Claims about writers: what a trajectory says about itself, and what its response may depend on."""

import pytest

from mpd_jax.recipe.write import DatasetWriter, ModelWriter
from mpd_jax.sampling.sampler import Response, SamplingConfig
from mpd_jax.types import Problem, UserError
from tests.test_chat import DROPS_REASONING, make_chat

PROBLEMS = (Problem("p1", "What is 7+8?", "15"), Problem("p2", "What is 1+1?", "2"))


class StubSampler:
    """Answers with given texts, in turn, and keeps what it was asked."""

    version = 3

    def __init__(self, chat, *texts: str, ended: str = "stopped"):
        self.chat, self.texts, self.ended, self.requests = chat, texts, ended, []

    def load(self, weights, version):
        pass

    def sample(self, requests, sampling, progress=None):
        self.requests += requests
        answers = [self.chat.encode(self.texts[i % len(self.texts)]) for i in range(len(requests))]
        return [Response(ids, (-1.0,) * len(ids), self.ended) for ids in answers]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return make_chat(tmp_path_factory.mktemp("chat"))


TEXT = "<think>\n7+8=15.\n</think>\n\n\\boxed{15}<|im_end|>"


def writer(chat, sampler, role="student", student=None, attempts=2, seed=0) -> ModelWriter:
    return ModelWriter(role, sampler, chat, student or chat, SamplingConfig(), attempts, seed)


def test_a_written_trajectory_tells_its_origin(chat):
    sampler = StubSampler(chat, TEXT)
    written = writer(chat, sampler)(PROBLEMS, 5)
    assert [(t.problem_id, t.attempt) for t in written] == [("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1)]
    t = written[0]
    assert (t.writer, t.version, t.ended, t.verdict, t.dropped) == ("student", 3, "stopped", "written", False)
    assert t.response == chat.encode(TEXT) and len(t.logprobs) == len(t.response) and t.original is None
    assert t.prompt == sampler.requests[0].prompt == chat.prompt("plain", PROBLEMS[0])


def test_ids_of_a_writer_that_read_another_prompt_go_on_as_text(chat, tmp_path):
    """A teacher that does not think writes no end of a thinking span, and the student's prompt wants one."""
    silent = make_chat(tmp_path, thinking=False)
    sampler = StubSampler(silent, "7+8 is \\boxed{15}<|im_end|>")
    (t,) = ModelWriter("teacher", sampler, silent, chat, SamplingConfig(), 1, 0)(PROBLEMS[:1], 0)
    assert t.ended == "assembled" and chat.split(t.response).closed
    assert chat.answer_text(t.response) == "7+8 is \\boxed{15}"


def test_the_teacher_s_weights_have_one_version(chat):
    written = writer(chat, StubSampler(chat, TEXT), role="teacher")(PROBLEMS, 3)
    assert {(t.writer, t.version) for t in written} == {("teacher", 0)}


def test_draws_depend_on_seed_step_problem_attempt_and_rollbacks_only(chat):
    def keys(problems=PROBLEMS, step=0, seed=0, **more):
        sampler = StubSampler(chat, TEXT)
        written = writer(chat, sampler, seed=seed)(problems, step, **more)
        return {(t.problem_id, t.attempt): r.key for t, r in zip(written, sampler.requests, strict=True)}

    first = keys()
    assert len(set(first.values())) == 4
    assert keys(PROBLEMS[::-1]) == first and keys(PROBLEMS[:1]).items() <= first.items()
    for other in (keys(step=1), keys(seed=1), keys(rollbacks=1)):
        assert not set(other.values()) & set(first.values())


def test_a_cut_response_keeps_its_ids_and_gets_no_end(chat):
    written = writer(chat, StubSampler(chat, "<think>\n7+8", ended="cut"))(PROBLEMS, 0)
    assert written[0].ended == "cut" and written[0].response == chat.encode("<think>\n7+8")


def test_a_teacher_that_stops_with_another_end_is_given_the_student_s(chat, tmp_path):
    base = make_chat(tmp_path, eos=("<|endoftext|>",))
    t = writer(chat, StubSampler(chat, TEXT), role="teacher", student=base)(PROBLEMS, 0)[0]
    assert t.ended == "stopped" and t.response == chat.encode(TEXT)[:-1] + base.encode("<|endoftext|>")


def test_between_vocabularies_only_text_travels(chat, tmp_path):
    student = make_chat(tmp_path, marks=("<think>", "</think>", "####", "15"))
    t = writer(chat, StubSampler(chat, TEXT), role="teacher", student=student)(PROBLEMS, 0)[0]
    assert (t.ended, t.logprobs) == ("assembled", ())
    assert t.response == student.encode(TEXT) != chat.encode(TEXT)
    cut = writer(chat, StubSampler(chat, TEXT[:14], ended="cut"), role="teacher", student=student)(PROBLEMS, 0)[0]
    assert cut.ended == "cut" and cut.response == student.encode(TEXT[:14])
    answer = TEXT.removesuffix("}<|im_end|>")
    cut = writer(chat, StubSampler(chat, answer, ended="cut"), role="teacher", student=student)(PROBLEMS, 0)[0]
    assert cut.ended == "cut" and cut.response == student.encode(answer)


@pytest.mark.parametrize(
    ("response", "turn"),
    [
        ("<think>\nSo 7+8=15.\n</think>\n\n\\boxed{15}", "<think>\nSo 7+8=15.\n</think>\n\n\\boxed{15}<|im_end|>"),
        ("So 7+8=15. \\boxed{15}", "<think>\n\n</think>\n\nSo 7+8=15. \\boxed{15}<|im_end|>"),
        ("Say <|im_end|> 15", "<think>\n\n</think>\n\nSay < |im_end|> 15<|im_end|>"),
    ],
)
def test_a_dataset_response_is_written_as_the_template_writes_it(chat, response, turn):
    problem = Problem("p1", "What is 7+8?", response=response)
    (t,) = DatasetWriter(chat)([problem], 5)
    assert t.response == chat.encode(turn) and t.prompt == chat.prompt("plain", problem)
    assert (t.writer, t.version, t.ended, t.attempt, t.logprobs) == ("dataset", 0, "dataset", 0, ())


def test_a_dataset_response_for_a_model_without_thinking_has_no_tags(tmp_path):
    plain = make_chat(tmp_path, DROPS_REASONING, marks=())
    (t,) = DatasetWriter(plain)([Problem("p1", "?", response="<think>\nA.\n</think>\n\nB")], 0)
    assert plain.decode(t.response) == "A.\n\nB"


def test_a_problem_without_a_response_is_refused_by_name(chat):
    with pytest.raises(UserError, match=r"recipe\.write\.by=dataset: problem 'p2' has no response"):
        DatasetWriter(chat)(PROBLEMS[1:], 0)
