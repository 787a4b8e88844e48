"""From typed overrides to the frozen config and the run's name, and the messages for everything invalid."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from omegaconf import DictConfig

from xattn import config as xconfig
from xattn.backend import activations
from xattn.config import Config, compose, differences, run_hash, run_name
from xattn.data.corpus_tokenizer import vocab_size
from xattn.errors import BadInput
from xattn.model.size import num_params

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
GOLDEN = Path(__file__).parent.parent / "golden" / "default.yaml"
TEXT = ["data=text", "data.path=x"]


# ---- spellings and the hash ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["backend.theta=10000"], ["backend.theta=1e4"]),
        (["backend.theta=10000"], ["backend.theta=10000.0"]),
        (["backend.theta=1e4"], []),
        (["backend.qk_pre_activation=silu"], ["backend.qk_pre_activation=swish"]),
        (["backend=sigmoid"], ["backend.activation=sigmoid"]),
        (["backend=none"], ["backend.activation=none"]),
        (["backend=sigmoid", "backend.sigmoid_bias=-5"], ["backend.sigmoid_bias=-5.0", "backend=sigmoid"]),
        (["optimizer.learning_rate=0.001"], ["optimizer.learning_rate=1e-3"]),
        (["evaluation.sequences=all"], ['evaluation.sequences="all"']),
        (
            ["trainer=debug"],
            ["trainer.steps=20", "trainer.batch_size=8", "trainer.log_every=5", "trainer.eval_every=10"],
        ),
        (["tracking.wandb.mode=disabled", "tracking.wandb.project=p", "tracking.wandb.entity=e"], []),
        (["study=another", "resume=never", "trainer.checkpoint_every=3"], []),
        (["hydra.run.dir=/somewhere"], []),
    ],
)
def test_spellings_of_one_run_have_one_name(one: list[str], other: list[str]) -> None:
    assert differences(compose(one), compose(other)) == {}
    assert run_name(compose(one)) == run_name(compose(other))


# A valid value of every key that no default below has.
OTHER_VALUES: dict[str, Any] = {
    "backend.activation": "none",
    "backend.qk_pre_activation": "swish",
    "backend.theta": 500.0,
    "backend.context_length": 40,
    "backend.sigmoid_bias": "learned",
    "backend.window": 7,
    "backend.decay": "input",
    "backend.input_gate": "sigmoid",
    "backend.rotary_fraction": 0.5,
    "backend.sink": "zero",
    "backend.logit_scale": 2.0,
    "backend.implementation": "reference",
    "model.num_layers": 3,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.embedding_dim": 64,
    "model.mlp": "gelu",
    "model.mlp_dim": 11,
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.norm_placement": "pre",
    "model.qk_norm": "none",
    "model.layer_scale": 0.25,
    "model.dropout": 0.5,
    "model.embeddings": "tied",
    "model.layers": "scanned",
    "model.remat": "dots",
    "model.dtype": "bfloat16",
    "model.matmul_precision": "bfloat16",
    "model.conv": 3,
    "model.value_residual": "first",
    "model.exclusive": True,
    "model.output_norm": "rmsnorm",
    "model.output_gate": "head",
    "model.parameters": 900_000,
    "data.path": "another",
    "data.field": "body",
    "data.tokenizer": "bpe",
    "data.vocab_size": 512,
    "data.tiktoken_pattern": "gpt2",
    "data.documents": "packed",
    "data.end_of_text": "<eos>",
    "data.validation_fraction": 0.2,
    "optimizer.learning_rate": 0.5,
    "optimizer.weight_decay": 0.25,
    "optimizer.clip_norm": None,
    "optimizer.momentum": 0.5,
    "optimizer.beta1": 0.75,
    "optimizer.beta2": 0.75,
    "optimizer.eps": 1e-3,
    "schedule.name": "linear",
    "schedule.warmup_fraction": 0.5,
    "schedule.decay_fraction": 0.5,
    "schedule.final_fraction": 0.5,
    "trainer.steps": 77,
    "trainer.batch_size": 5,
    "trainer.gradient_accumulation": 4,
    "trainer.log_every": 11,
    "trainer.eval_every": 13,
    "trainer.attention_stats_every": 6,
    "trainer.checkpoint_every": 17,
    "trainer.checkpoint_minutes": 19.0,
    "trainer.deterministic": True,
    "trainer.threads": 3,
    "trainer.keep": "nothing",
    "trainer.nonfinite": "skip",
    "evaluation.sequences": "all",
    "evaluation.probes": ["in_context"],
    "tracking.wandb.mode": "disabled",
    "tracking.wandb.project": "another",
    "tracking.wandb.entity": "someone",
    "tracking.wandb.tags": ["one", "two"],
    "tracking.wandb.notes": "why",
    "tracking.wandb.job_type": "train",
    "tracking.wandb.system_metrics": True,
    "tracking.wandb.console": True,
    "tracking.wandb.artifacts": ["checkpoint"],
    "parallel.data": 2,
    "parallel.fsdp": 2,
    "parallel.context": 2,
    "parallel.tensor": 2,
    "parallel.heartbeat_seconds": 7,
    "parallel.connect_seconds": 7,
    "sweep.pack": 2,
    "sweep.workers": 2,
    "sweep.half_width": 0.5,
    "sweep.budget_minutes": 7.5,
    "sweep.pilot_seeds": 5,
    "finding": {
        "claim": "one is better",
        "source": "a paper",
        "contrasts": [{"name": "one − other", "of": {"seed": 1}, "shown": "> 0", "contradicted": "< 0"}],
    },
    "seed": 3,
    "study": "another",
    "resume": "never",
}
NOT_HASHED = {key for key in OTHER_VALUES if key.startswith(("tracking.", "parallel.", "sweep."))} | {
    "study",
    "resume",
    "finding",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.keep",
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_every_key_but_the_named_ones_changes_the_hash(optimizer: str) -> None:
    """A new key fails here until it has a value above, and so until somebody has thought of its hash."""
    on_demand = ["sweep.half_width=0.1", "sweep.budget_minutes=1"]
    base = compose([*TEXT, "data.tokenizer=tokenizer.json", f"optimizer={optimizer}", *on_demand])
    apart = ("optimizer.name", "data.name", "backend.every", "backend.then", "model.init_from")
    keys = [key for key, _ in _leaves(base.model_dump(mode="json")) if key not in apart]
    assert set(keys) <= set(OTHER_VALUES)
    for key in keys:
        raw = base.model_dump(mode="json")
        *groups, leaf = key.split(".")
        section = raw
        for group in groups:
            section = section[group]
        assert section[leaf] != OTHER_VALUES[key], key
        section[leaf] = OTHER_VALUES[key]
        changed = Config.model_validate(raw)
        assert (run_hash(changed) == run_hash(base)) == (key in NOT_HASHED), key
        assert list(differences(base, changed)) == ([] if key in NOT_HASHED else [key])


def test_choices_of_another_kind_change_the_hash() -> None:
    configs = [compose(o) for o in ([], TEXT, ["optimizer=sgd"], ["optimizer=lion"], ["optimizer=muon"])]
    assert len({run_hash(config) for config in configs}) == len(configs)


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


PATTERN = ["backend=none", "backend.every=2", "backend.then={activation: softmax, theta: 500}"]


def test_a_pattern_changes_the_hash_by_what_it_changes() -> None:
    base, none = compose(PATTERN), compose(["backend=none"])
    assert base.backend.kinds["then"] == compose(["backend.theta=500"]).backend
    others = (["backend.every=4"], ["backend.then.theta=400"], ["backend.then.activation=sigmoid"], ["backend.theta=5"])
    hashes = [run_hash(config) for config in (none, base, *(compose([*PATTERN, *other]) for other in others))]
    assert len(set(hashes)) == len(hashes)
    assert differences(none, base) == {
        "backend.every": (None, 2),
        "backend.then.activation": (None, "softmax"),
        "backend.then.theta": (None, 500.0),
    }
    assert "-every2-softmax-theta_500-" in run_name(base)


def test_a_name_shows_the_terms_that_a_run_has() -> None:
    assert run_name(compose(["backend=fox"])).startswith("softmax-decay_input-rotary_fraction_0-python_stdlib-")
    gated = run_name(compose(["backend=hybrid", "model.output_gate=head", "model.exclusive=true"]))
    assert "-every4-" in gated
    assert "-exclusive_true-output_gate_head-python_stdlib-" in gated


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (["backend.every=2", "backend.then={theta: 1e4, qk_pre_activation: none}"], []),
        (["backend.every=2", "backend.then={}"], []),
        (
            ["backend.every=1", "backend.then={activation: sigmoid, sigmoid_bias: -3}"],
            ["backend=sigmoid", "backend.sigmoid_bias=-3.0"],
        ),
        (
            ["backend.every=2", "backend.then={activation: sigmoid, qk_pre_activation: silu, theta: 10000}"],
            ["backend.every=2", "backend.then={activation: sigmoid, qk_pre_activation: swish}"],
        ),
    ],
)  # fmt: skip
def test_a_pattern_is_read_as_what_it_is(pattern: list[str], same: list[str]) -> None:
    assert compose(pattern) == compose(same)
    assert run_hash(compose(pattern)) == run_hash(compose(same))


def test_what_a_kind_does_not_take_it_does_not_inherit() -> None:
    config = compose(
        ["backend=sigmoid", "backend.sigmoid_bias=learned", "backend.every=2", "backend.then={activation: none}"]
    )
    assert config.backend.kinds["then"].sigmoid_bias == "auto"
    assert config.backend.kinds["backend"].sigmoid_bias == "learned"
    assert config.model_dump()["backend"]["then"] == {"activation": "none"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backend.every=2"], "every and then go together"),
        (["backend.then={activation: none}"], "every and then go together"),
        (["backend.every=5", "backend.then={activation: none}"], "backend.every = 5: must be at most"),
        (["backend.every=0", "backend.then={activation: none}"], "backend.every = 0"),
        (["backend.every=2", "backend.then={activation: sigmod}"], "did you mean sigmoid"),
        (["backend.every=9", "backend.then={thet: 3}"], "backend.then.thet = 3: no such key (did you mean"),
        (["backend.every=2", "backend.then={context_length: 3}"], "backend.then.context_length"),
        (["backend.every=2", "backend.then={sigmoid_bias: 3}"], "softmax takes no sigmoid_bias"),
        (["backend.every=2", "backend.then={theta: 3, sigmoid_bias: auto}"], "softmax takes no sigmoid_bias"),
        (["backend=sigmoid", "backend.every=2", "backend.then={activation: none, sigmoid_bias: 1}"], "none takes no"),
        (["backend.every=2", "backend.then={implementation: quick}"], "'blockwise' or 'reference'"),
        (["backend.every=2", "backend.then=softmax"], "must be a mapping, such as {activation"),
        (["backend.every=2", "backend.then.theta=3"], "backend.then={theta: 3}"),
        (["backend.theta=-1", "backend.every=2", "backend.then={activation: none}"], "backend.theta = -1"),
    ],
)  # fmt: skip
def test_a_bad_pattern_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as raised:
        compose(overrides)
    assert len(str(raised.value).splitlines()) <= 2


def test_a_run_is_named_by_what_it_computes() -> None:
    name = run_name(compose(["backend=sigmoid", "backend.qk_pre_activation=silu", "seed=4"]))
    assert name.startswith("sigmoid-swish-python_stdlib-lr0.003-seed4-")
    assert name.endswith(run_hash(compose(["backend=sigmoid", "backend.qk_pre_activation=silu", "seed=4"])))


# ---- defaults, and every file of conf/ -------------------------------------------------------------------------------


def test_the_default_config_is_the_golden_one() -> None:
    """A changed default shows up in review. To renew the file, from the repository's root:

    python -c "from xattn import config as c; print(c.save(c.compose()), end='')" > tests/golden/default.yaml
    """
    assert xconfig.save(compose()) == GOLDEN.read_text()


CHOICES = sorted(file for file in CONF.glob("*/*.yaml") if file.stem != "base" and file.parent.name != "hydra")


@pytest.mark.parametrize("file", CHOICES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_of_every_group_composes(file: Path) -> None:
    needed = {"sources": "[{path: a.txt, weight: 3}]", "path": "x", "dataset": "x"}
    values = [f"data.{key}={value}" for key, value in needed.items() if f"{key}: ???" in file.read_text()]
    if "/data: text" in file.read_text() or "- shakespeare_cpu" in file.read_text():
        values.append("data.path=x")
    config = compose([f"{file.parent.name}={file.stem}", *values])
    section = getattr(config, file.parent.name, None)
    assert getattr(section, "name", file.stem) == file.stem
    if file.parent.name == "backend":  # an activation, or a preset
        assert (config.backend.activation == file.stem) == (file.stem in activations.names())


def test_experiments_say_their_question_and_their_command() -> None:
    experiments = sorted((CONF / "experiment").glob("*.yaml"))
    assert experiments
    for file in experiments:
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert any(line.startswith("# Question: ") for line in head), file
        assert any(f"experiment={file.stem}" in line for line in head if line.startswith("# Command: ")), file


def test_debug_changes_only_length_and_pace() -> None:
    changed = differences(compose(), compose(["trainer=debug"]))
    assert set(changed) <= {"trainer.steps", "trainer.batch_size", "trainer.log_every", "trainer.eval_every"}


def test_a_verdict_has_a_core_of_its_own_and_evaluates_once() -> None:
    """The experiment adds to it what is no matter of pace, whatever is compared."""
    trainer = compose(["experiment=verdict", "model.output_gate=channel"]).trainer
    assert trainer == compose(["trainer=verdict"]).trainer
    assert (trainer.threads, trainer.eval_every, trainer.checkpoint_every) == (1, trainer.steps, None)


# ---- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["backend=sigmoid", "backend.sigmoid_bias=learned", "backend.window=5", "model.layer_scale=1e-4"],
        ["backend.sigmoid_bias=-3.25", "optimizer=muon", "optimizer.clip_norm=null", "seed=4294967295"],
        ["data=text", "data.path='/some folder/ü, #1: \"a\" {b} [c] 100%/*.txt'"],
        ["data=text", 'data.path="1e4"', 'study="007"'],
        ["data=text", 'data.path="null"', 'study="yes"'],
        ["data=text", r"data.path='\${HOME}/x'"],
        ["data=text", "data.path='  '"],
        ["data=text", "data.path='a\nb'"],
    ],
    ids=str,
)
def test_a_saved_config_is_read_back_as_it_was(overrides: list[str], tmp_path: Path) -> None:
    config = compose(overrides)
    path = tmp_path / "config.yaml"
    path.write_text(xconfig.save(config), encoding="utf-8")
    assert xconfig.load(path) == config
    assert run_name(xconfig.load(path)) == run_name(config)


# ---- model.parameters ------------------------------------------------------------------------------------------------


def parameters_of(config: Config) -> int:
    return num_params(config.model, config.backend, vocab_size=vocab_size(config.data))


def test_mlp_dim_is_chosen_for_a_number_of_parameters(tmp_path: Path) -> None:
    """In each arm its own, whatever mlp_dim is typed; config.yaml has it, and is read as it stands."""
    asked = ["model.parameters=900000"]
    arms = [[], ["model.mlp=gelu"], ["model.output_gate=channel"], ["model.num_kv_heads=2", "data.documents=packed"]]
    chosen = [compose([*arm, *asked]) for arm in arms]
    assert len({config.model.mlp_dim for config in chosen}) == len(arms)
    for arm, config in zip(arms, chosen, strict=True):
        assert abs(parameters_of(config) - 900_000) <= 4 * 3 * 128 / 2  # half of what one hidden unit has
        assert compose([*arm, *asked, "model.mlp_dim=5"]) == config
        path = tmp_path / "config.yaml"
        path.write_text(xconfig.save(config), encoding="utf-8")
        assert yaml.safe_load(path.read_text("utf-8"))["model"]["mlp_dim"] == config.model.mlp_dim
        assert xconfig.load(path) == config
        values = yaml.safe_load(path.read_text("utf-8"))
        assert xconfig.from_hydra(DictConfig(values)) == config
    assert list(differences(compose(), chosen[0])) == ["model.mlp_dim", "model.parameters"]
    assert compose(["model.parameters=null"]) == compose()


def test_numbers_that_lead_to_one_mlp_dim_share_a_program_and_not_a_name() -> None:
    exact = parameters_of(compose())
    one, other, plain = compose([f"model.parameters={exact}"]), compose([f"model.parameters={exact + 1}"]), compose()
    assert one.model.mlp_dim == other.model.mlp_dim == plain.model.mlp_dim
    assert xconfig.program_key(one) == xconfig.program_key(other) == xconfig.program_key(plain)
    assert len({run_hash(config) for config in (one, other, plain)}) == 3


@pytest.mark.parametrize(
    ("data", "vocabulary"),
    [
        ([], 256),
        (["data.documents=separated"], 257),
        (["data.tokenizer=bpe", "data.vocab_size=512"], 512),
        (["data=mixture", "data.sources=[{path: a, weight: 1}]", "data.documents=packed"], 257),
        (["data=hf", "data.dataset=d"], 256),
        (["data=memmap", "data.path=p", "data.vocab_size=999"], 999),
        (["data=mqar", "data.vocab_size=64"], 64),
        (["data=copying", "data.vocab_size=65"], 65),
    ],
    ids=str,
)
def test_the_vocabulary_is_known_without_the_data(data: list[str], vocabulary: int) -> None:
    """None of these corpora is there."""
    config = compose([*data, "model.parameters=900000"])
    assert vocab_size(config.data) == vocabulary
    with_more = num_params(config.model, config.backend, vocab_size=vocabulary + 10)
    assert abs(parameters_of(config) - 900_000) <= 768 < abs(with_more - 900_000)


def test_the_vocabulary_of_a_tokenizers_file_is_read_from_it(tmp_path: Path) -> None:
    """As it is now: another file of the same name is another vocabulary. Where none is needed none is read."""
    file = tmp_path / "tokenizer.json"
    typed = ["data=text", "data.path=nowhere", f"data.tokenizer={file}"]
    compose(typed)
    with pytest.raises(BadInput, match=r"^data\.tokenizer = .*No such file"):
        compose([*typed, "model.parameters=900000"])
    for words in (3, 300):
        model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(words)}, "unk_token": "w0"}
        file.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}), "utf-8")
        config = compose([*typed, "model.parameters=900000"])
        assert abs(num_params(config.model, config.backend, vocab_size=words) - 900_000) <= 768


def test_an_evaluation_on_other_data_leaves_the_model_as_it_is() -> None:
    config = compose(["model.parameters=900000"])
    amended = xconfig.amend(config, ["data=mqar", "data.vocab_size=4096"], may_differ=["data"])
    assert amended.model == config.model


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["model.parameters=5"], "model.parameters = 5: must be at least 331136"),
        (["model.parameters=0"], "model.parameters = 0: must be greater than 0"),
        (["model.parameters=1e6"], "model.parameters = 1000000.0: must be a valid integer"),
        (["model.parameters=many"], "model.parameters = 'many': must be a valid integer"),
    ],
)
def test_a_number_of_parameters_that_cannot_be_is_bad_input(typed: list[str], told: str) -> None:
    with pytest.raises(BadInput) as error:
        compose(typed)
    assert str(error.value).startswith(told)


def test_a_model_that_starts_from_weights_has_their_size(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(BadInput) as error:
        compose([f"model.init_from={tmp_path}", "model.parameters=900000"])
    assert str(error.value).startswith("model.parameters = 900000: must be null with model.init_from")


def test_a_config_is_frozen() -> None:
    config = compose()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.backend.theta = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a: [",
        b"\xff\xfe\x00",
        b"just a word",
        b"- 1\n- 2\n",
        b"backend: 3\n",
        b"a: ${b}\n",
        b"a: 1\nb: 2\n" * 9,
        b"1: 2\n",
        b"seed: 2001-99-99\n",
    ],
)
def test_a_file_that_is_no_config_is_bad_input(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.yaml") as error:
        xconfig.load(path)
    assert len(str(error.value).splitlines()) <= 5


def test_no_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.yaml"):
        xconfig.load(tmp_path / "config.yaml")


def test_overrides_are_kept_as_typed() -> None:
    typed = ["seed=1", 'data.path="a, b"', "x={a: 1}", "1e4", "null", "${seed}", "ü"]
    assert yaml.safe_load(xconfig.to_yaml(typed)) == typed


# ---- messages --------------------------------------------------------------------------------------------------------

BAD = [
    # a key
    (["backend.activaton=softmax"], ["backend.activaton", "no such key", "did you mean backend.activation?"]),
    (["optimizer.learning_rte=1"], ["optimizer.learning_rte", "did you mean optimizer.learning_rate?"]),
    (["activation=sigmoid"], ["activation", "did you mean backend.activation?"]),
    (["trainer.step=5"], ["trainer.step", "did you mean trainer.steps?"]),
    (["evaluation.window=5"], ["evaluation.window", "did you mean evaluation.sequences?"]),
    (["optimizer=sgd", "optimizer.momentm=0.5"], ["optimizer.momentm", "did you mean optimizer.momentum?"]),
    (["optimizer=sgd", "optimizer.beta1=0.5"], ["optimizer.beta1", "no such key"]),
    (["lr=3"], ["lr", "no such key", "did you mean optimizer.learning_rate?"]),
    (["optimizer.wd=0"], ["optimizer.wd", "did you mean optimizer.weight_decay?"]),
    (["+foo=1"], ["foo", "no such key"]),
    (["+backend.foo=1"], ["backend.foo", "no such key"]),
    (["data.path=x"], ["data.path", "no such key", "data=text"]),
    (["~backend.theta"], ["backend.theta", "required, for example"]),
    (["~seed"], ["seed", "required, for example"]),
    # a choice
    (["backend=sigmod"], ["backend", "sigmod", "did you mean sigmoid?", "allowed: alibi, fox, gla"]),
    (["backend=gpt-oss"], ["backend = gpt-oss: no such choice (did you mean gpt_oss?)"]),
    (["backend=gated"], ["backend = gated: no such choice (did you mean experiment=gated?)"]),
    (["experiment=fox"], ["experiment = fox: no such choice (did you mean backend=fox?)"]),
    (["experiment=gemma"], ["experiment = gemma: no such choice (did you mean gemma3?)"]),
    (["trainer=debg"], ["trainer", "debg", "did you mean debug?", "debug, default"]),
    (["optimizer=adam"], ["optimizer", "adam", "did you mean adamw?", "lion", "muon", "sgd"]),
    (["experiment=nothing"], ["experiment", "nothing", "shakespeare_cpu"]),
    (["experiment=null"], ["experiment = null", "leave it out", "shakespeare_cpu"]),
    (["backend=base"], ["backend", "base", "allowed: alibi, fox, gla"]),
    (["backend=null"], ["backend", "allowed: alibi, fox, gla"]),
    (["backend=3"], ["backend", "3", "allowed: alibi, fox, gla"]),
    (["optimizer=[1,2]"], ["optimizer", "adamw"]),
    (["backend={a:1}"], ["backend", "allowed: alibi, fox, gla"]),
    (["optimizer.name=sgd"], ["optimizer"]),
    (["optimizer.name=adam"], ["optimizer.name", "'adam'", "did you mean adamw?"]),
    (["data.name=txt"], ["data.name", "'txt'", "did you mean text?"]),
    (["tracking.wandb=off"], ["tracking.wandb", "off"]),
    # a word
    (["backend.activation=sigmod"], ["backend.activation", "'sigmod'", "'none'", "did you mean sigmoid?"]),
    (["backend.activation=null"], ["backend.activation", "None", "'softmax'", "'sigmoid'", "'none'"]),
    (["backend.qk_pre_activation=siwsh"], ["backend.qk_pre_activation", "'siwsh'", "did you mean swish?"]),
    (["resume=yes"], ["resume", "'auto' or 'never'"]),
    (["trainer.nonfinite=halt"], ["trainer.nonfinite", "'halt'", "'stop'", "'skip'"]),
    (["model.dtype=float16"], ["model.dtype", "'float16'", "'float32'", "'bfloat16'"]),
    (["tracking.wandb.mode=on"], ["tracking.wandb.mode", "'auto', 'online', 'offline' or 'disabled'"]),
    (["study=../outside"], ["study", "'../outside'", "letters, digits"]),
    (["study=a/b"], ["study", "'a/b'"]),
    (["study=''"], ["study", "''"]),
    (["study=.hidden"], ["study", "'.hidden'"]),
    (["data=text", "data.path=''"], ["data.path", "''"]),
    (["tracking.wandb.project=''"], ["tracking.wandb.project", "''"]),
    # a number
    (["optimizer.learning_rate=abc"], ["optimizer.learning_rate", "'abc'", "number"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate", "0", "greater than 0"]),
    (["optimizer.learning_rate=-1e-3"], ["optimizer.learning_rate", "-0.001", "greater than 0"]),
    (["optimizer.learning_rate=nan"], ["optimizer.learning_rate", "nan", "finite"]),
    (["optimizer.learning_rate=inf"], ["optimizer.learning_rate", "inf", "finite"]),
    (["optimizer.learning_rate=null"], ["optimizer.learning_rate", "None", "number"]),
    (["optimizer.learning_rate='1e-3'"], ["optimizer.learning_rate", "'1e-3'", "number"]),
    (["optimizer.weight_decay=-1"], ["optimizer.weight_decay", "-1", "greater than or equal to 0"]),
    (["optimizer.beta2=1"], ["optimizer.beta2", "1", "less than 1"]),
    (["optimizer.clip_norm=0"], ["optimizer.clip_norm", "0", "greater than 0"]),
    (["backend.theta=0"], ["backend.theta", "0", "greater than 0"]),
    (["backend.theta=-1"], ["backend.theta", "-1", "greater than 0"]),
    (["backend.theta=inf"], ["backend.theta", "inf", "finite"]),
    (["backend.context_length=0"], ["backend.context_length", "0", "greater than 0"]),
    (["backend.context_length=64.5"], ["backend.context_length", "64.5", "integer"]),
    (["backend.sigmoid_bias=learnd"], ["backend.sigmoid_bias", "'learnd'", "'auto'", "did you mean learned?"]),
    (["backend.sigmoid_bias=inf"], ["backend.sigmoid_bias", "inf", "finite", "'auto'"]),
    (["backend.window=0"], ["backend.window", "0", "greater than 0"]),
    (["trainer.steps=0"], ["trainer.steps", "0", "greater than 0"]),
    (["trainer.steps=1.5"], ["trainer.steps", "1.5", "integer"]),
    (["trainer.steps=10.0"], ["trainer.steps", "10.0", "integer"]),
    (["trainer.steps=true"], ["trainer.steps", "True", "integer"]),
    (["trainer.steps=[1,2]"], ["trainer.steps", "[1, 2]", "integer"]),
    (["trainer.steps={a:1}"], ["trainer.steps", "integer"]),
    (["trainer.batch_size=-4"], ["trainer.batch_size", "-4", "greater than 0"]),
    (["seed=-1"], ["seed", "-1", "greater than or equal to 0"]),
    (["seed=4294967296"], ["seed", "4294967296", "less than"]),
    (["seed=1e3"], ["seed", "1000.0", "integer"]),
    (["model.dropout=1"], ["model.dropout", "1", "less than 1"]),
    (["model.norm_eps=0"], ["model.norm_eps", "0", "from 1e-30 to 1e30"]),
    (["model.norm_eps=1e-60"], ["model.norm_eps", "1e-60", "from 1e-30 to 1e30"]),
    (["model.norm_eps=-1e-5"], ["model.norm_eps", "-1e-05", "from 1e-30 to 1e30"]),
    (["model.norm_eps=inf"], ["model.norm_eps", "inf", "finite number"]),
    (["model.norm_eps=null"], ["model.norm_eps", "None", "valid number"]),
    (["model.norm_esp=1e-5"], ["model.norm_esp", "no such key", "model.norm_eps"]),
    (["data.validation_fraction=1"], ["data.validation_fraction", "1", "less than 1"]),
    (["evaluation.sequences=some"], ["evaluation.sequences", "'some'", "integer", "'all'"]),
    (["evaluation.sequences=0"], ["evaluation.sequences", "0", "'all'"]),
    (["evaluation.probes=induction"], ["evaluation.probes = 'induction': must be a list, [induction]"]),
    # numbers that do not fit together
    (["model.embedding_dim=130"], ["embedding_dim", "130", "num_heads", "4"]),
    (["model.embedding_dim=100"], ["embedding_dim", "25", "odd"]),
    (["model.num_heads=3"], ["num_heads", "3", "128"]),
    (["model.num_kv_heads=3"], ["num_kv_heads", "3", "4"]),
    (
        ["schedule=wsd", "schedule.warmup_fraction=0.9"],
        ["warmup_fraction", "0.9", "decay_fraction", "0.2", "more than 1"],
    ),
    (
        ["data=memmap", "data.path=x", "data.vocab_size=50", "data.end_of_text=50"],
        ["data.end_of_text must be below data.vocab_size = 50"],
    ),
    (
        ["data=text", "data.path=x", "data.end_of_text=xyz"],
        ["data.end_of_text names a token of a tokenizer.json; bytes has its own end of text"],
    ),
    (
        ["data=mixture", "data.sources=[{path: a, weight: 1}, {path: b, weight: 0}]"],
        ["data.sources[1].weight = 0: must be greater than 0"],
    ),
    (["data=mixture", "data.sources=[{path: a}]"], ["data.sources[0].weight: required"]),
    # missing values and interpolations
    (["data=text"], ["data.path", "required, for example", "data.path="]),
    (["trainer.steps=???"], ["trainer.steps", "required, for example"]),
    (["trainer.steps=${sed}"], ["sed", "did you mean seed?"]),
    (["trainer.steps=${oc.env:XATTN_NOT_SET}"], ["trainer.steps", "XATTN_NOT_SET"]),
    (["trainer.steps=${trainer.steps}"], ["trainer.steps"]),
    (["data=null"], ["data = null", "no such choice", "python_stdlib"]),
    (["experiment=null"], ["experiment = null", "leave it out for none"]),
    (["hydra/job_logging=colorlog"], ["hydra/job_logging = colorlog: no such choice", "disabled"]),
    (["hydra.job.env_copy=[XATTN_NOT_SET]"], ["hydra.job.env_copy = XATTN_NOT_SET"]),
    # text that the grammar reads as something else
    (["study=1e3"], ["study = 1000.0", "text", """'study="1e3"'"""]),
    (["study=1_000"], ["study = 1000", """'study="1_000"'"""]),
    (["study=null"], ["study = None", """'study="null"'"""]),
    (["study=true"], ["study = True", """'study="true"'"""]),
    (["study=nan"], ["study = nan", """'study="nan"'"""]),
    (["study={a:1}"], ["study = {'a': 1}: must be text"]),
    (["data=text", "data.path=123"], ["data.path = 123", """'data.path="123"'"""]),
    (["data=text", "data.path=x", "data.tokenizer=1"], ["data.tokenizer = 1", """'data.tokenizer="1"'"""]),
    (["tracking.wandb.project=1e3"], ["""'tracking.wandb.project="1e3"'"""]),
    (["data=mixture", "data.sources=[{path: 1, weight: 1}]"], ["data.sources[0].path = 1: must be text, in quotes"]),
    # the grammar
    (["sigmoid"], ["sigmoid", "key=value"]),
    (["seed=1=2"], ["seed=1=2", "quotes"]),
    ([""], ["key=value"]),
    (["data=text", "data.path=/tmp/ü/x"], ["/tmp/ü/x", "quotes", "'data.path=\"/some folder/a,b.txt\"'"]),
    (["data=text", "data.path=a(1).txt"], ["a(1).txt", "quotes"]),
    (["data=text", "data.path=a,b.txt"], ["a,b.txt", "-m", "quotes"]),
    (["seed=0,1"], ["seed=0,1", "-m"]),
]


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=lambda part: " ".join(part) if part else "none")
def test_a_bad_value_is_a_short_message_that_names_it(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(BadInput) as error:
        compose(overrides)
    message = str(error.value)
    for fragment in expected:
        assert fragment in message
    assert 1 <= len(message.splitlines()) <= 5
    assert "Traceback" not in message
    assert "pydantic" not in message


def test_one_bad_item_of_a_list_is_one_line() -> None:
    with pytest.raises(BadInput) as error:
        compose(["data=mixture", "data.sources=[{path: a, weight: 0}]"])
    assert str(error.value) == "data.sources[0].weight = 0: must be greater than 0"


def test_text_that_looks_like_a_date_or_an_octal_number_is_text() -> None:
    for text in ("2026-11-29", "010", "0x10", "on"):
        assert compose([f"study={text}"]).study == text


@pytest.fixture
def own_choices(tmp_path: Path) -> str:
    """The override that has Hydra look in a folder with experiments of somebody's own."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {steps: 3}\n")
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ntrainer: {stepz: 3}\n")
    (tmp_path / "experiment" / "other.yaml").write_text("defaults: [/model: huge]\n")
    return f"hydra.searchpath=[file://{tmp_path}]"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["experiment=mine", "trainer.stepz=3"], "trainer.stepz: no such key (did you mean trainer.steps?)"),
        (["experiment=mine", "backend=sigmod"], "backend = sigmod: no such choice (did you mean sigmoid?)"),
        (
            ["experiment=mine", "data=text", "data.path=x", "data.pth=4"],
            "data.pth: no such key (did you mean data.path?)",
        ),
        (["experiment=mine", "study=1e3"], "study = 1000.0: must be text"),
        (["experiment=mine", "data=null"], "data = null: no such choice"),
        (["experiment=mino"], "experiment = mino: no such choice (did you mean mine?); allowed: exclusive, "),
        (["experiment=typo"], "trainer.stepz = 3: no such key (did you mean trainer.steps?)"),
        (["experiment=other"], "experiment/other.yaml: model = huge: no such choice; allowed: gpt2, nano, small"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_choices_of_ones_own_are_not_blamed_for_another_mistake(typed: list[str], told: str, own_choices: str) -> None:
    with pytest.raises(BadInput) as error:
        compose([own_choices, *typed])
    assert told in str(error.value)


def test_a_folder_of_ones_own_is_composed_and_its_choices_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "book.yaml").write_text("defaults: [text, _self_]\npath: book.txt\n")
    config = compose(["data=book"], config_dir=tmp_path)
    assert config.data == compose(["data=text", "data.path=book.txt"]).data
    amended = xconfig.amend(compose(), ["data=book"], may_differ=["data"], config_dir=tmp_path)
    assert amended.data == config.data
    with pytest.raises(BadInput, match=r"data = bok: no such choice \(did you mean book\?\)"):
        compose(["data=bok"], config_dir=tmp_path)
    with pytest.raises(BadInput, match=r"^data = 7: no such choice; allowed: book, copying"):
        compose(["data=7"], config_dir=tmp_path)
    with pytest.raises(BadInput, match=rf"^--config-dir = {re.escape(str(tmp_path))}/gone: no such folder$"):
        compose(["data=book"], config_dir=tmp_path / "gone")


def test_a_run_is_not_called_as_the_folder_of_the_report(tmp_path: Path) -> None:
    """One that is there already, made before this was refused, can go on."""
    with pytest.raises(BadInput, match="cannot be called report"):
        xconfig.folder_of(compose(), tmp_path / "report")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "config.yaml").touch()
    assert xconfig.folder_of(compose(), tmp_path / "report") == tmp_path / "report"


def test_a_key_of_the_runs_own_choice_is_suggested_where_a_config_is_amended() -> None:
    with pytest.raises(BadInput, match=r"data\.pth: no such key \(did you mean data\.path\?\)"):
        xconfig.amend(compose(TEXT), ["data.pth=y"], may_differ=["data"])


def test_many_bad_values_are_five_lines() -> None:
    bad = ["backend.theta=-1", "model.dropout=2", "trainer.steps=0", "trainer.batch_size=0", "seed=-1", "resume=x"]
    with pytest.raises(BadInput) as five:
        compose(bad[:5])
    assert len(str(five.value).splitlines()) == 5
    with pytest.raises(BadInput) as six:
        compose(bad)
    assert len(str(six.value).splitlines()) == 5
    assert str(six.value).endswith("and 2 more")


# ---- anything at all -------------------------------------------------------------------------------------------------

_KEYS = [
    *OTHER_VALUES,
    "backend",
    "model",
    "data",
    "optimizer",
    "schedule",
    "trainer",
    "tracking",
    "experiment",
    "hydra",
]
_keys = st.sampled_from(_KEYS) | st.builds(
    lambda key, i: key[:i] + key[i + 1 :], st.sampled_from(_KEYS), st.integers(0, 20)
)
_WORDS = (
    "0 1 2 -1 0.5 1e-3 1e400 nan -inf inf null true ??? auto all learned softmax sigmoid none text adamw debug wsd [] "
    "{} [1] {a:1} ${seed} ${nothing} ${ $ ' \" \\ , a,b range(3) glob(*) ü"
)
_values = st.sampled_from([*_WORDS.split(), "", " ", "a b", "9" * 60]) | st.text(
    st.sampled_from("ab01.,=:;/\\'\"${}[]()~+-*?#%&! \n\tü\0"), max_size=8
)
_overrides = st.lists(
    st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++", "~"]), _keys, _values) | _values, max_size=3
)


@settings(max_examples=150)
@given(_overrides)
def test_any_overrides_are_a_config_or_a_short_message(overrides: list[str]) -> None:
    try:
        config = compose(overrides)
    except BadInput as error:
        message = str(error)
    else:
        message = run_name(Config.model_validate(config.model_dump(mode="json")))
        assert message == run_name(config)
    assert 1 <= len(message.splitlines()) <= 5


# ---- start-up --------------------------------------------------------------------------------------------------------


def test_what_answers_at_once_imports_no_jax() -> None:
    code = (
        "import sys, xattn, xattn.app, xattn.config, xattn.runs.desk, xattn.runs.run_folder, xattn.runs.provenance, "
        "xattn.model.config, xattn.tracking.display, xattn.sweep.runs, xattn.sweep.resume, "
        "xattn.commands.explain, xattn.commands.prune, xattn.commands.bug\n"
        "xattn.config.compose(['backend=sigmoid'])\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'wandb', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONF.parent)
