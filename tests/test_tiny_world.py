"""Claims about the tiny world: its splits, its numbers, its tokenizer and template, its documents, what is shipped."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import mpd_jax.tiny_world
from mpd_jax.models.config import ModelConfig
from mpd_jax.models.decoder import Model
from mpd_jax.tiny_world import corpus, generator, pretrain
from mpd_jax.tiny_world.tokenizer import END, END_OF_TEXT, MAX_LENGTH, VOCAB_SIZE, save_tokenizer, train_tokenizer

SHIPPED = Path(mpd_jax.tiny_world.__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus.tokenizer_texts(0, 1000))


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, directory)
    return AutoTokenizer.from_pretrained(str(directory))


def skeleton(question: str) -> str:
    """The chain of operations, read back from the words alone."""
    ops = re.findall(r"(finds|buys|gets|loses|sells|gives away|doubles|triples) ?(half|\d+)?", question)
    kind = {"finds": "+", "buys": "+", "gets": "+", "loses": "-", "sells": "-", "gives away": "-"}
    words = ["/2" if n == "half" else {"doubles": "*2", "triples": "*3"}.get(verb) or kind[verb] + n for verb, n in ops]
    return " ".join([re.search(r"has (\d+)", question)[1], *words])


def solve(question: str) -> int:
    """An independent solver: it knows the words, not the generator."""
    first, *rest = skeleton(question).split()
    value = int(first)
    for op in rest:
        n = int(op[1:])
        value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[op[0]]
    return value


def test_answers_are_those_of_an_independent_solver():
    for problem in generator.train_problems(400, 3) + generator.heldout_problems(200, 3):
        assert str(solve(problem.question)) == problem.answer
        assert problem.response.endswith(f"</think>\n\n\\boxed{{{problem.answer}}}")


def test_no_chain_of_operations_is_in_both_splits():
    train = {skeleton(problem.question) for problem in generator.train_problems(6000, 1)}
    heldout = {skeleton(problem.question) for problem in generator.heldout_problems(1500, 1)}
    assert not train & heldout
    assert all(generator.stable_hash(chain) % generator.HELDOUT_SHARE == 0 for chain in heldout)


def test_problem_sets_are_seeded_prefixes_without_duplicates():
    problems = generator.heldout_problems(600, 5)
    assert generator.heldout_problems(100, 5) == problems[:100]
    assert generator.heldout_problems(100, 6) != problems[:100]
    assert len({problem.question for problem in problems}) == len({problem.id for problem in problems}) == 600


def test_pretraining_draws_no_heldout_problem(tokenizer):
    heldout = {skeleton(problem.question) for problem in generator.heldout_problems(3000, 0)}
    documents = corpus.Corpus(tokenizer, corpus.TEACHER_MIX)
    rng, seen = random.Random(0), 0
    for _ in range(800):
        text = tokenizer.decode(documents.draw(rng).ids.tolist(), skip_special_tokens=False)
        if stories := re.findall(r"\w+ has \d+ .*? have now\?", text):
            assert skeleton(stories[0]) not in heldout
            seen += 1
    assert seen > 500


def test_no_trace_of_pretraining_follows_a_heldout_chain(tokenizer, monkeypatch):
    """Drafts that misread their story included."""
    told, render = [], generator.render
    monkeypatch.setattr(
        generator, "render", lambda story, *args, **more: told.append(story) or render(story, *args, **more)
    )
    documents, rng = corpus.Corpus(tokenizer, corpus.TEACHER_MIX), random.Random(3)
    for _ in range(2000):
        documents.draw(rng)
    assert len({story.skeleton for story in told}) > 1000
    assert not [story.skeleton for story in told if story.heldout]


@pytest.mark.parametrize("repaired", [True, False])
def test_every_equation_of_a_repaired_trace_is_right_or_put_right(repaired):
    rng = random.Random(1)
    wrong = 0
    for _ in range(300):
        story = generator.draw_story(rng, heldout=False)
        trace, answer = generator.render(story, generator.draw_plan(rng, len(story.steps), 1.0, 0.4), repaired=repaired)
        for line, after in zip(trace.split("\n"), [*trace.split("\n")[1:], ""], strict=True):
            for a, op, b, c in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", line):
                right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) // int(b)}[op]
                assert right == int(c) or not repaired or after.endswith(f"so {c} was wrong.")
        wrong += answer != story.answer
    assert wrong == 0 if repaired else wrong > 100


def test_repair_keeps_the_sentences_and_compress_keeps_only_the_equations():
    rng = random.Random(2)
    for _ in range(200):
        story = generator.draw_story(rng, heldout=False)
        plan = generator.draw_plan(rng, len(story.steps), 1.0, 0.5)
        right, answer = generator.render(story, plan, slips=False)
        flawless = replace(plan, steps=tuple(replace(step, slip=0) for step in plan.steps))
        assert (right, answer) == generator.render(story, flawless)
        assert answer == story.answer and "wrong" not in right
        concise, _ = generator.render(story, generator.CONCISE, slips=False)
        assert re.fullmatch(r"(Mon|Tue|Wed): \d+[-+*/]\d+=\d+(\n(Mon|Tue|Wed): \d+[-+*/]\d+=\d+)*", concise)
        assert list(dict.fromkeys(equations(concise))) == list(dict.fromkeys(equations(right)))


def equations(trace: str) -> list[str]:
    return re.findall(r"\d+[-+*/]\d+=\d+", trace)


def test_rewrites_hold_the_answer_of_the_story_whatever_the_draft_says(tokenizer):
    rng, wrong = random.Random(3), 0
    for i in range(300):
        story = generator.draw_story(rng, heldout=False)
        content, response, thinking = corpus._rewrite(rng, story, ("compress", "repair")[i % 2])
        assert response.count("\n####\n") == 1
        assert response.endswith(f"\n####\n\\boxed{{{story.answer}}}")
        assert response.startswith("<think>\n") == thinking
        assert "<think>" not in content and "</think>" not in content
        wrong += f"\\boxed{{{story.answer}}}" not in content
    assert 50 < wrong < 200


def test_tokenizer_round_trips_any_text_with_single_digits_and_keys(tokenizer):
    text = "Mon: 12+7=19\nTue: héllo 日本 \x00 \t<think>\n1205</think>\n####\n\\boxed{7}<|im_end|>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    for piece in (
        "<think>",
        "</think>",
        "####",
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
        "Mon",
        "\\boxed{",
        "\n",
    ):
        assert len(tokenizer.encode(piece).ids) == 1, piece
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d.|.\d", token)]
    key = tokenizer.encode("Mon").ids[0]
    assert key in tokenizer.encode("12 coins. Mon: Leo").ids and key in tokenizer.encode("\nMon: 1").ids


def test_template_is_what_the_documents_are_made_of(hf_tokenizer):
    user = [{"role": "user", "content": "Q"}]
    for thinking in (True, False):
        rendered = hf_tokenizer.apply_chat_template(
            user, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert rendered == corpus.prompt_text("Q", thinking)
    turn = {"role": "assistant", "reasoning_content": "Mon: 1+2=3", "content": "\\boxed{3}"}
    whole = hf_tokenizer.apply_chat_template([*user, turn], tokenize=False)
    assert whole == corpus.prompt_text("Q") + generator.response_text("Mon: 1+2=3", 3) + END + "\n"
    inline = {"role": "assistant", "content": generator.response_text("Mon: 1+2=3", 3)}
    assert hf_tokenizer.apply_chat_template([*user, inline], tokenize=False) == whole
    # As in Qwen3, thoughts of turns before the last question are forgotten.
    later = hf_tokenizer.apply_chat_template([*user, turn, *user], tokenize=False)
    assert "<think>" not in later


def test_documents_weigh_results_three_times_and_end(tokenizer):
    documents = corpus.Corpus(tokenizer, corpus.STUDENT_MIX)
    document = documents.weigh(documents.encode("5+4=9"), documents.encode("12+7=19, so\n\\boxed{19}" + END))
    heavy = tokenizer.decode(document.ids[document.weights == corpus.RESULT_WEIGHT].tolist())
    assert heavy == "1919"
    assert document.ids[-1] == tokenizer.token_to_id(END) and document.weights[-1] == 1.0
    assert np.all(document.weights[:5] == np.float32(corpus.PROMPT_WEIGHT))


def test_batches_hold_every_document_once_and_no_row_is_empty(tokenizer):
    documents = corpus.Corpus(tokenizer, corpus.STUDENT_MIX)
    drawn = []

    def draw(rng):
        drawn.append(documents.draw(rng))
        return drawn[-1]

    batches = corpus.Batches(draw, 0)
    stream, rows = iter(batches), []
    for _ in range(12):
        tokens, weights = next(stream)
        assert tokens.shape in corpus.SHAPES and (weights.max(axis=1) >= 1).all()
        rows += [tuple(row[: int((weight > 0).sum())].tolist()) for row, weight in zip(tokens, weights, strict=True)]
    waiting = [tuple(d.ids.tolist()) for shape in corpus.SHAPES for d in batches.waiting[shape]]
    # The last batch is cleared from the waiting list only when the next one is asked for.
    assert set(rows) | set(waiting) == {tuple(document.ids.tolist()) for document in drawn}


@pytest.mark.slow
def test_pretraining_learns_and_is_bit_identical_under_one_seed():
    recipe = replace(pretrain.STUDENT, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, steps=30, warmup=5)
    tokens = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    weights = np.ones((4, 16), np.float32)
    weights[1] = 0.0

    def run(seed):
        lines = []
        config = pretrain.hf_config(recipe, [0], 1)
        result = pretrain.pretrain(recipe, config, iter([(tokens, weights)] * 30), seed, lines.append, every=15)
        losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
        return jax.device_get(result[1]), losses, result[2]

    first, losses, record = run(0)
    again, _, _ = run(0)
    other, _, _ = run(1)
    assert losses[1] < 0.5 * losses[0] and record["tokens"] == 30 * 48
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embed"], other["embed"])


def test_muon_takes_the_matrices_of_the_blocks_from_what_they_read_to_what_they_write():
    config = pretrain.hf_config(pretrain.TEACHER, [0], 1)
    axes = Model(ModelConfig.from_hf(config)).logical_axes()
    flat, _ = jax.tree.flatten_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    numbers = {path[-1].key: pretrain._dimension_numbers(leaf) for path, leaf in flat}
    chosen = {name: (n.reduction_axis, n.output_axis) for name, n in numbers.items() if n is not None}
    read, write = ((1,), (2, 3)), ((1, 2), (3,))
    mlp = {"gate": ((1,), (2,)), "up": ((1,), (2,)), "down": ((1,), (2,))}
    assert chosen == {"q": read, "k": read, "v": read, "o": write, **mlp}


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_shipped_model_is_small_and_its_files_agree(name, tokenizer):
    directory = SHIPPED / name
    config = json.loads((directory / "config.json").read_text())
    generation = json.loads((directory / "generation_config.json").read_text())
    shipped = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert config["tie_word_embeddings"] == (name == "student")
    assert config["head_dim"] in (32, 64) and config["max_position_embeddings"] == MAX_LENGTH
    assert generation["eos_token_id"] == [shipped.token_to_id(END), shipped.token_to_id(END_OF_TEXT)]
    other = Tokenizer.from_file(str(SHIPPED / ("teacher" if name == "student" else "student") / "tokenizer.json"))
    assert shipped.get_vocab() == other.get_vocab()


def test_shipped_files_are_under_eight_megabytes():
    files = [file for name in ("student", "teacher") for file in (SHIPPED / name).rglob("*") if file.is_file()]
    assert 2e6 < sum(file.stat().st_size for file in files) < 8e6


def test_measured_teacher_rewrites_right_and_is_verbose_by_default():
    measured = json.loads((SHIPPED / "measured.json").read_text())
    assert measured["contexts"] == corpus.CONTEXTS

    def row(name, **keys):
        return next(row for row in measured[name] if all(row.get(k) == v for k, v in keys.items()))

    for thinking in (True, False):
        assert row("teacher", context="compress", temperature=0.6, thinking=thinking)["accuracy"] >= 0.95
    plain, concise = (row("teacher", context=context, temperature=1.0) for context in ("plain", "concise"))
    assert plain["mean_tokens"] > 2 * concise["mean_tokens"]
    assert row("student", context="plain", temperature=1.0)["mean_tokens"] > 100
