"""A reopened run: sampling, evaluation, and the errors for impossible requests."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import xattn
from xattn.cli import main
from xattn.config import compose
from xattn.data.bpe import train_bpe
from xattn.data.run_data import load_data
from xattn.data.tokenizer import ByteTokenizer, JsonTokenizer
from xattn.errors import BadInput, IntegrityError
from xattn.model.transformer import LanguageModel, init_params
from xattn.runs.desk import run
from xattn.runs.streaming import pieces as as_pieces
from xattn.system.screen import UNPRINTABLE
from xattn.training.programs import hyperparameters


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    overrides = [
        *("data=text", f"data.path={text_file}", "backend=sigmoid", "backend.context_length=16"),
        *(
            "trainer=debug",
            "trainer.steps=6",
            "trainer.eval_every=3",
            "trainer.attention_stats_every=3",
            "tracking.wandb.mode=disabled",
        ),
        *("model.embedding_dim=16", "model.num_heads=2", "model.num_layers=1", "model.mlp_dim=16"),
        *("evaluation.sequences=10", "evaluation.probes=[in_context,mqar]", "optimizer.learning_rate=1e-2"),
    ]
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run(compose(overrides), folder, overrides, quiet=True) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(trained: Path) -> xattn.LoadedRun:
    return xattn.load(trained)


def random_params(model: LanguageModel) -> Any:
    shapes: Any = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), shapes)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_logits_in_one_call(loaded: xattn.LoadedRun) -> None:
    """A sequence or a batch of them; what the vocabulary lacks is told, not clamped."""
    tokens = np.arange(20).reshape(2, 10)
    whole = loaded.logits(tokens)
    assert whole.shape == (2, 10, loaded.model.vocab_size)
    np.testing.assert_allclose(loaded.logits(tokens[1]), whole[1], rtol=1e-5, atol=1e-5)
    expected = jax.jit(loaded.model.apply)({"params": loaded.params}, tokens, loaded.hyperparameters)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    apart = loaded.logits(tokens[0], segment_ids=np.arange(10) // 5)
    np.testing.assert_allclose(apart[:5], whole[0, :5], rtol=1e-5, atol=1e-5)
    assert np.abs(apart[5:] - whole[0, 5:]).max() > 1e-3
    back = [0, 0, 1, 1, 1, 0, 0, 0, 2, 2]
    assert np.abs(loaded.logits(tokens[0], segment_ids=back)[5] - apart[5]).max() > 1e-3
    convolved = dataclasses.replace(
        loaded, model=loaded.model.clone(config=loaded.model.config.model_copy(update={"conv": 2}))
    )
    with pytest.raises(BadInput, match="segment_ids: an id recurs"):
        convolved.logits(tokens[0], segment_ids=back)
    for bad, message in (
        (tokens - 1, "0 to 255, got -1"),
        (tokens + 250, "got 250 to 269"),
        ([0.5], "integers of shape"),
    ):
        with pytest.raises(BadInput, match=message):
            loaded.logits(bad)


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluating_again_gives_the_summarys_figures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    code, out, _ = told(capsys, "evaluate", str(trained), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["step"] == 6
    assert found["overrides"] == []
    assert found["val_loss"] == summary["val_loss"]
    assert found["val_bpb"] == summary["val_bpb"]
    probes = {key: value for key, value in summary.items() if key.startswith("probe/")}
    assert {"probe/in_context/score", "probe/mqar/accuracy"} <= set(probes)
    assert {key: value for key, value in found.items() if key.startswith("probe/")} == probes
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before
    code, out, _ = told(capsys, "evaluate", str(trained))
    assert f"{summary['val_loss']:.4f}" in out


def test_a_saved_evaluation_is_a_line_of_its_own(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = trained / "evaluations.jsonl"
    file.write_text('{"step": 1')  # a line that was cut short
    override = "evaluation.sequences=3"
    shown = []
    for again in (False, True):
        code, out, err = told(capsys, "evaluate", str(trained), override, "--save", "--json")
        assert code == 0
        assert ("not measured again" in err) == again
        shown.append(json.loads(out))
    assert shown[0] == shown[1]
    lines = file.read_text().splitlines()
    assert lines[0] == '{"step": 1'
    (row,) = (json.loads(line) for line in lines[1:])
    assert (row["step"], row["overrides"]) == (6, [override])
    assert row["results"]["val_loss"] != json.loads((trained / "summary.json").read_text())["val_loss"]
    file.unlink()
    assert told(capsys, "evaluate", str(trained), "evaluation.sequences=0", "--save")[0] == 2
    assert not file.exists()


def test_data_that_are_named_are_measured_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may have changed since; a result that has not is no second row."""
    text, file = tmp_path / "text.txt", trained / "evaluations.jsonl"
    words = ["evaluate", str(trained), f"data.path={text}", "evaluation.probes=[]", "--save"]
    for content in ("to be or not to be, that is the question\n", "another text altogether, with other letters\n"):
        text.write_text(content * 40)
        assert told(capsys, *words)[0] == 0
        assert told(capsys, *words)[0] == 0
    losses = [json.loads(line)["results"]["val_loss"] for line in file.read_text().splitlines()]
    assert len(losses) == len(set(losses)) == 2
    file.unlink()


def test_attention_statistics_are_those_of_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for by the key that logs them; they are no part of an evaluation otherwise."""
    code, out, _ = told(capsys, "evaluate", str(trained), "trainer.attention_stats_every=2", "--json")
    assert code == 0
    found = {key: value for key, value in json.loads(out).items() if key.startswith("attention/")}
    summary = json.loads((trained / "summary.json").read_text())
    assert found == pytest.approx({key: summary[key] for key in found}, rel=1e-4)
    assert len(found) == sum(key.startswith("attention/") for key in summary) > 0


def test_a_task_is_evaluated_with_other_sequences(tmp_path: Path) -> None:
    """The hash of a task's data is of the sequences that the run itself scores: others are not other data."""
    small = ["model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"]
    small += ["backend.context_length=8", "evaluation.sequences=9"]
    config = compose([*small, "data=copying", "data.vocab_size=16"])
    data = load_data(config.data, config.batching)
    model, hyper = LanguageModel(config.model, config.backend, 16), hyperparameters(config).model
    params = random_params(model)
    opened = xattn.LoadedRun(tmp_path, config, {}, model, params, hyper, data.tokenizer, 0)
    (tmp_path / "provenance.json").write_text(json.dumps({"data_sha256": data.sha256}))
    for overrides in ([], ["evaluation.sequences=4"], ["backend.context_length=16"]):
        assert opened.evaluate(overrides)["val_loss"] is not None
    (tmp_path / "provenance.json").write_text(json.dumps({"data_sha256": "other"}))
    with pytest.raises(IntegrityError, match="the data are not the ones"):
        opened.evaluate(["evaluation.sequences=4"])


def test_another_corpus_and_another_length(loaded: xattn.LoadedRun, tmp_path: Path) -> None:
    """Against the model itself; sigmoid's n stays that of training unless it is asked for."""
    text = tmp_path / "other.txt"
    text.write_text("to be or not to be, that is the question: " * 30)
    held_out = text.read_bytes()[-500:]
    data = [f"data.path={text}", f"data.validation_fraction={500 / text.stat().st_size}", "evaluation.sequences=all"]
    overrides = ["evaluation.probes=[]", "backend.context_length=40", *data]

    def expected(bias: float) -> float:
        hyper = loaded.hyperparameters._replace(sigmoid_bias=np.float32(bias))
        forward = jax.jit(lambda tokens: loaded.model.apply({"params": loaded.params}, tokens, hyper))
        nats = 0.0
        for start in range(0, 499, 40):
            tokens = np.frombuffer(held_out[start : start + 41], np.uint8)
            padded = np.zeros((1, 40), np.int32)  # to the right, where no token looks
            padded[0, : len(tokens) - 1] = tokens[:-1]
            logits = np.asarray(forward(padded)[0, : len(tokens) - 1], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats -= log_p[np.arange(len(tokens) - 1), tokens[1:]].sum()
        return nats / 499

    fixed = loaded.evaluate(overrides)["val_loss"]
    longer = loaded.evaluate([*overrides, "backend.sigmoid_bias=auto"])["val_loss"]
    assert fixed == pytest.approx(expected(-math.log(16)), rel=1e-5)
    assert longer == pytest.approx(expected(-math.log(40)), rel=1e-5)
    assert abs(fixed - longer) > 1e-5
    assert loaded.evaluate(["data=text", *overrides])["val_loss"] == fixed


def test_without_data_given_the_text_has_to_be_what_it_was(
    trained: Path, loaded: xattn.LoadedRun, tmp_path: Path
) -> None:
    """And once they are given, it is read as it is now."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"another text than the one it was trained on " * 300)
    data = loaded.config.data.model_copy(update={"path": str(text)})
    moved = dataclasses.replace(loaded, config=loaded.config.model_copy(update={"data": data}))
    with pytest.raises(IntegrityError, match=r"the data are not the ones that this run began with .*was "):
        moved.evaluate(["evaluation.probes=[]"])
    assert moved.evaluate(["evaluation.probes=[]", f"data.path={text}"])["val_loss"] is not None


def test_documents_are_the_runs_own_unless_they_are_given(tmp_path: Path) -> None:
    """A model of bytes with ends of text, 257 tokens, reads a text that has none, and one that has."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {i} of some"}) for i in range(60)))
    small = ["model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"]
    config = compose([*small, "data.documents=separated", "backend.context_length=8", "evaluation.sequences=9"])
    model, hyper = LanguageModel(config.model, config.backend, 257), hyperparameters(config).model
    params = random_params(model)
    opened = xattn.LoadedRun(tmp_path, config, {}, model, params, hyper, ByteTokenizer(end_of_text=True), 0)
    path = f"data.path={text}"
    separated = opened.evaluate(["data=text", path])
    assert separated == opened.evaluate(["data=text", path, "data.documents=separated"])
    assert separated != opened.evaluate(["data=text", path, "data.documents=joined"])


def test_a_kind_of_layers_inherits_a_bias_that_is_given_and_keeps_one_of_its_own(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 20)
    small = ["model.num_layers=2", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"]
    small += ["backend.context_length=8", "evaluation.sequences=4", "data=text", f"data.path={text}", "backend=sigmoid"]

    def opened(then: str) -> xattn.LoadedRun:
        config = compose([*small, "backend.every=2", f"backend.then={{{then}}}"])
        model, hyper = LanguageModel(config.model, config.backend, 256), hyperparameters(config).model
        params = random_params(model)
        return xattn.LoadedRun(tmp_path, config, {}, model, params, hyper, ByteTokenizer(), 0)

    first, both = "backend.sigmoid_bias=2", "backend.then.sigmoid_bias=2"
    inherits, own = opened("theta: 50"), opened("sigmoid_bias: -3")
    assert inherits.evaluate([first]) == inherits.evaluate([first, both]) != inherits.evaluate()
    assert own.evaluate([first]) != own.evaluate([first, both])
    for override in ("backend.sigmoid_bias=learned", "backend.then.sigmoid_bias=learned"):
        with pytest.raises(BadInput, match="learned: this run has no learned value"):
            own.evaluate([override])


def test_another_text_is_read_in_a_bpe_models_own_tokens(tmp_path: Path) -> None:
    """Not in a vocabulary that is learned from that text; and bits are counted by its own bytes."""
    tokenizer = JsonTokenizer(train_bpe(iter(["to be or not to be, that is the question\n"] * 9), 270)).without_border()
    (tmp_path / "tokenizer.json").write_text(tokenizer.text, "utf-8")
    text = tmp_path / "other.txt"
    text.write_text("whether 'tis nobler in the mind to suffer " * 20)
    small = ["model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8", "model.mlp_dim=8"]
    config = compose([*small, "data=text", "data.path=gone", "data.tokenizer=bpe", "backend.context_length=8"])
    model, hyper = LanguageModel(config.model, config.backend, 270), hyperparameters(config).model
    params = random_params(model)
    opened = xattn.LoadedRun(tmp_path, config, {}, model, params, hyper, tokenizer, 0)
    found = opened.evaluate([f"data.path={text}", "data.validation_fraction=0.5", "evaluation.sequences=all"])

    ids = tokenizer.encode(text.read_text())
    held_out = ids[len(ids) - len(ids) // 2 :]
    assert held_out.max() > 256  # pairs that the model's own text has taught
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens, hyper))
    nats = 0.0
    for start in range(0, len(held_out) - 1, 8):
        sequence = held_out[start : start + 9]
        logits = np.asarray(forward(np.resize(sequence[:-1], (1, 8)))[0, : len(sequence) - 1], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= log_p[np.arange(len(sequence) - 1), sequence[1:]].sum()
    assert found["val_loss"] == pytest.approx(nats / (len(held_out) - 1), rel=1e-5)
    size = len(tokenizer.decode(held_out[1:]).encode())
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    with pytest.raises(BadInput, match="a vocabulary of 64 tokens; the model's has 270"):
        opened.evaluate(["data=mqar", "data.vocab_size=64", "data.num_pairs=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "RUN", "model.num_layers=2"], "model.num_layers=2: cannot be changed here"),
        (["evaluate", "RUN", "modle=nano"], "modle=nano: no such key (did you mean model"),
        (["evaluate", "RUN", "evaluation.sequences=0"], "evaluation.sequences = 0"),
        (["evaluate", "RUN", "evaluation.widows=3"], "did you mean evaluation.sequences"),
        (["evaluate", "RUN", "evaluation.probes=[nothing]"], "evaluation.probes"),
        (["evaluate", "RUN", "data.path=/nowhere/at.all"], "data.path = '/nowhere/at.all': no such file"),
        (
            ["evaluate", "RUN", "data=mqar", "evaluation.probes=[]", "data.num_pairs=2"],
            "a vocabulary of 8192 tokens; the model's has 256",
        ),
        (["evaluate", "RUN", "backend.sigmoid_bias=learned"], "this run has no learned value"),
        (["evaluate", "RUN", "--chekpoint", "best"], "--chekpoint"),
        (["evaluate", "/nowhere"], "/nowhere: not a run folder"),
        (["evaluate"], "run"),
        (["evaluate", "RUN", "data.tokenizer=bpe"], "data.tokenizer: text is read with the model's own tokenizer"),
        (["evaluate", "RUN", "backend.implementation=cudnn"], "backend.implementation: "),
        (["sample", "/nowhere"], "/nowhere: not a run folder"),
        (["sample", "RUN", "--temperature", "-1"], "--temperature: -1: must be at least 0"),
        (["sample", "RUN", "--temperature", "nan"], "--temperature: nan"),
        (["sample", "RUN", "--temperature", "warm"], "--temperature: invalid number value: 'warm'"),
        (["sample", "RUN", "--top-p", "0"], "--top-p: 0: must be above 0 and at most 1"),
        (["sample", "RUN", "--top-k", "0"], "--top-k: 0: must be at least 1"),
        (["sample", "RUN", "--max-tokens", "0"], "--max-tokens: 0: must be at least 1"),
        (["sample", "RUN", "--seed", "-1"], "--seed: -1"),
        (["sample", "RUN", "--stop", ""], "--stop"),
        (["sample", "RUN", "--checkpoint", "first"], "--checkpoint: invalid choice: 'first'"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_a_few_lines(
    trained: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = told(capsys, *(str(trained) if word == "RUN" else word for word in words))
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("xattn: ")
    assert len(err.splitlines()) <= 5


# ---- sample ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_all_that_stdout_gets(
    trained: Path, loaded: xattn.LoadedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(trained), "--prompt", "line 7", "--max-tokens", "40", "--temperature", "1.5"]
    code, out, err = told(capsys, *words)
    assert code == 0
    assert "40 tokens" in err
    assert "tokens/s" in err
    choices: dict[str, Any] = {"max_tokens": 40, "temperature": 1.5}
    raw = loaded.generate("line 7", **choices)
    assert out == raw.replace("\ufffd", "·") + "\n"
    assert err.count(UNPRINTABLE) == ("\ufffd" in raw)
    assert told(capsys, *words, "--seed", "1")[1] != out
    two = told(capsys, *words, "--num-samples", "2")[1]
    assert two == out + loaded.generate("line 7", sample=1, **choices).replace("\ufffd", "·") + "\n"
    assert two != out + out
    assert told(capsys, *words, "--top-k", "1")[1] == told(capsys, *words, "--temperature", "0")[1]
    letter = next(letter for letter in out[20:] if letter != "·")
    assert told(capsys, *words, "--stop", letter)[1] == out[: out.index(letter)] + "\n"
    assert loaded.generate("", max_tokens=3, temperature=0.0) == loaded.generate("\n", max_tokens=3, temperature=0.0)


def pieces(text: str, size: int) -> Iterator[np.ndarray]:
    tokens = ByteTokenizer().encode(text)
    return (tokens[i : i + size] for i in range(0, len(tokens), size))


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("stop", "end"), [([], None), (["never"], None), (["öö"], 6), (["a€", "öö", "b"], 3), (["€€"], None), (["🙂"], 8)]
)
def test_text_comes_in_pieces_that_no_later_token_changes(size: int, stop: list[str], end: int | None) -> None:
    """Letters of two, three and four bytes, cut anywhere; a stop may begin in one piece and end in the next."""
    text = "abcöa€öö🙂 x€"
    if "b" in stop:
        text, end = "abcöa€öö🙂 x€"[2:], 2
    told = list(as_pieces(ByteTokenizer(), pieces(text, size), stop))
    assert "".join(piece.text for piece in told) == text[:end]
    assert not any("\ufffd" in piece.text for piece in told)


def test_bytes_that_are_no_text_are_shown_in_the_end() -> None:
    told = list(as_pieces(ByteTokenizer(), iter([np.array([65, 0xE2]), np.array([0x82])]), []))
    assert "".join(piece.text for piece in told) == "A\ufffd"
    assert sum(piece.num_tokens for piece in told) == 3


def test_a_prompt_that_the_vocabulary_lacks() -> None:
    from xattn.data.tokenizer import IdTokenizer
    from xattn.runs.loaded_run import LoadedRun

    nothing: Any = None
    opened = LoadedRun(Path(), nothing, {}, nothing, nothing, nothing, IdTokenizer(8), 0)
    with pytest.raises(BadInput, match=r"prompt = '9': 9: not an id; ids are 0 to 7"):
        opened.stream("9")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: must be at least 0"),
        ({"top_k": 0}, "top_k = 0: must be at least 1"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1"),
        ({"max_tokens": 0}, "max_tokens = 0: must be at least 1"),
    ],
)
def test_a_number_out_of_range_is_told_in_python_too(
    loaded: xattn.LoadedRun, choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        loaded.generate(**choice)


def test_a_single_stop_is_one_word_and_not_its_letters(loaded: xattn.LoadedRun) -> None:
    assert loaded.generate("line", stop="never said") == loaded.generate("line")
