"""Interchange: runs as Llamas and Llamas as runs, compared with Llama's formula in NumPy and with transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import xattn
from xattn.cli import main
from xattn.commands.interchange import _write, from_llama, llama_config, to_llama
from xattn.config import Config, compose, hashed_values, load, run_name, save
from xattn.data.batches import Batching
from xattn.data.bpe import train_bpe
from xattn.data.run_data import load_data
from xattn.data.tokenizer import IdTokenizer
from xattn.errors import BadInput, ExitCode, IntegrityError
from xattn.keys import flatten
from xattn.model.transformer import LanguageModel, LayerHyperparameters
from xattn.runs import run_folder
from xattn.runs.desk import run
from xattn.runs.job import Job
from xattn.sweep.check import check_data
from xattn.training.llama import LlamaFolder, initial_weights

V, S = 19, 9
LLAMA = [
    *("model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.embedding_dim=24", "model.mlp_dim=10"),
    *("model.norm_placement=pre", "model.qk_norm=none", "model.layers=scanned", "backend.theta=50"),
    f"backend.context_length={S}",
]
TOKENS = np.random.default_rng(0).integers(0, V, (2, S))


def exported(folder: Path, *overrides: str) -> tuple[Config, Any, np.ndarray]:
    """A model with every parameter away from its initial value, written to a folder; its parameters and logits."""
    config = compose([*LLAMA, *overrides])
    model = LanguageModel(config.model, config.backend, V)
    hyper = LayerHyperparameters(jnp.float32(config.backend.theta), jnp.float32(0))
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, hyper)["params"]
    params = jax.tree.map(lambda leaf: (0.5 * random.standard_normal(leaf.shape) + 0.1).astype(np.float32), shapes)
    logits = jax.jit(lambda params: model.apply({"params": params}, TOKENS, hyper))(params)
    _write(folder, llama_config(config, V), to_llama(dict(flatten(params)), config))
    return config, params, np.asarray(logits)


def llama(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Touvron et al., arXiv 2302.13971, with rotate_half, from the files alone, in float64."""
    config = json.loads((folder / "config.json").read_text())
    weights = {
        name: array.astype(np.float64)
        for file in folder.glob("*.safetensors")
        for name, array in load_file(file).items()
    }
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    length = tokens.shape[1]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    angles = np.arange(length)[:, None] * config["rope_theta"] ** (-2 * np.arange(width // 2) / width)
    cos, sin = np.tile(np.cos(angles), 2), np.tile(np.sin(angles), 2)

    def rope(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    def split(x: np.ndarray, number: int) -> np.ndarray:
        x = x.reshape(*x.shape[:2], number, width).swapaxes(1, 2)
        return np.repeat(x, heads // number, axis=1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q = rope(split(linear(h, f"{at}.self_attn.q_proj"), heads))
        k = rope(split(linear(h, f"{at}.self_attn.k_proj"), kv_heads))
        v = split(linear(h, f"{at}.self_attn.v_proj"), kv_heads)
        scores = np.where(np.tri(length, dtype=bool), q @ k.swapaxes(-1, -2) / np.sqrt(width), -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v
        x = x + linear(out.swapaxes(1, 2).reshape(x.shape), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(h, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_a_llama_of_the_files_computes_our_logits(tmp_path: Path, embeddings: str) -> None:
    config, params, logits = exported(tmp_path / "llama", f"model.embeddings={embeddings}", "model.norm_eps=0.25")
    np.testing.assert_allclose(llama(tmp_path / "llama", TOKENS), logits, rtol=1e-4, atol=1e-4)
    overrides, back = from_llama(tmp_path / "llama")
    assert overrides.pop("vocab_size") == V
    typed = [f"{key}={value}" for key, value in overrides.items()]
    assert compose([*typed, "model.layers=scanned"]) == config
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_transformers_computes_our_logits(tmp_path: Path) -> None:
    """And saves them in shards that we read back. Where torch and transformers are installed; the tests around this one
    are the same everywhere, from the formula."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        pytest.skip("torch and transformers are not installed")
    import torch
    from transformers import LlamaForCausalLM

    _, params, logits = exported(tmp_path / "llama", "model.norm_eps=1e-5")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again", max_shard_size="5KB")
    overrides, back = from_llama(tmp_path / "again")
    assert overrides["model.norm_eps"] == 1e-5
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layers_of_two_kinds_are_no_llama() -> None:
    with pytest.raises(BadInput, match=r"a Llama cannot express this model: backend.every = 2"):
        llama_config(compose([*LLAMA, "backend.every=2", "backend.then={window: 3}"]), V)


def test_what_is_no_llama_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"a Llama cannot express this model: backend\.activation = sigmoid, model\.qk_norm"
    ):
        llama_config(compose([*LLAMA, "backend=sigmoid", "model.qk_norm=rmsnorm"]), V)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="must be a new or empty folder"):
        _write(tmp_path, {}, {})
    with pytest.raises(BadInput, match=r"config\.json: cannot be read: No such file"):
        from_llama(tmp_path)


# ---- a Llama of others --------------------------------------------------------------------------------------------

# As transformers 4 writes it. 5 has rope_parameters in place of the two lines on RoPE.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 10,
    "max_position_embeddings": 16,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": V,
}


def published(folder: Path, dtype: Any = np.float32, *, scale: float = 0.5, vocab_size: int = V) -> Path:
    """A random Llama in two shards, as transformers writes one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {"vocab_size": vocab_size}))
    random = np.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab_size, 24), "lm_head": (vocab_size, 24)}
    shapes["model.norm"] = (24,)
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (12 if name in "kv" else 24, 24) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj": (10, 24) for name in ("gate", "up")} | {f"{at}.mlp.down_proj": (24, 10)}
        shapes |= {f"{at}.{name}_layernorm": (24,) for name in ("input", "post_attention")}
    numbers = {
        f"{name}.weight": (scale * random.standard_normal(shape) + (len(shape) == 1)).astype(dtype)
        for name, shape in shapes.items()
    }
    put_shards(folder, numbers)
    return folder


def put_shards(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def change_config(folder: Path, **changed: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return published(tmp_path / "llama")


def test_a_published_llama_computes_its_logits(tmp_path: Path) -> None:
    """In shards, of bfloat16, and with numbers so small that its epsilon of 1e-5 is felt: the compiled model in float32
    is the formula."""
    folder = published(tmp_path / "llama", ml_dtypes.bfloat16, scale=1e-2)
    found = xattn.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype("float32")}
    assert found.config.model.norm_eps == 1e-5
    theirs = llama(folder, TOKENS)
    size = np.abs(theirs).max()
    np.testing.assert_allclose(found.logits(TOKENS), theirs, rtol=0, atol=1e-5 * size)
    change_config(folder, rms_norm_eps=1e-6)
    assert np.abs(llama(folder, TOKENS) - theirs).max() > 1e-2 * size


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_parameters_are_float32_and_the_numbers_of_the_file(dtype: Any, tmp_path: Path) -> None:
    folder = published(tmp_path / "llama", dtype)
    _, params = from_llama(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    kept = params["layers"]["mlp"]["up"]["kernel"][1].T
    np.testing.assert_array_equal(kept, weights_of(folder)["model.layers.1.mlp.up_proj.weight"].astype(np.float32))


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"rope_parameters": PLAIN_ROPE, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling = .*llama3",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": PLAIN_ROPE}, "rope_parameters = "),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = .*; scaled or partial RoPE"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling = .*; scaled or partial RoPE"),
        ({"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}}, "scaled or partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; must be 1"),
        ({"rope_parameters": PLAIN_ROPE | {"rope_theta": 1e6}}, "rope_theta is 500.0 and 1000000.0; must be one"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ({"head_dim": 2}, "head_dim = 2; must be hidden_size"),
        ({"num_attention_heads": 5}, "must be hidden_size / num_attention_heads"),
        ({"num_attention_heads": 8}, "= 3 is odd"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads = 3"),
        ({"num_key_value_heads": None}, r"k_proj.weight has shape \(12, 24\); by config.json it must be \(24, 24\)"),
        ({"vocab_size": 999}, r"weight has shape .*; by config\.json it must be \(999"),
        ({"num_hidden_layers": 9}, r"missing: model\.layers\.2\..* and \d+ more"),
        ({"num_hidden_layers": 1}, r"unknown tensors: model\.layers\.1\..* and 8 more"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be less"),
        ({"attention_bias": True}, "attention_bias = True: must be False"),
        ({"mlp_bias": True}, "mlp_bias = True: must be False"),
        ({"sliding_window": 4}, "sliding_window = 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.* must be 'LlamaForCausalLM'"),
        ({"model_type": "mistral"}, "model_type = 'mistral': must be 'llama'"),
    ],
)
def test_a_llama_that_ours_does_not_compute_is_refused(changed: dict[str, object], told: str, folder: Path) -> None:
    change_config(folder, **changed)
    with pytest.raises(BadInput, match=told):
        from_llama(str(folder))


def test_each_key_of_the_model_has_a_value_in_a_llama_or_changes_no_function_of_it(folder: Path) -> None:
    """A new key fails here until somebody has thought of what a Llama has for it."""
    free = {f"backend.{name}" for name in ("context_length", "implementation", "sigmoid_bias", "then")}
    free |= {f"model.{name}" for name in ("dropout", "dtype", "init_from", "layers", "matmul_precision", "remat")}
    free |= {"model.parameters"}  # what it chose is mlp_dim
    every = {key for key in hashed_values(compose()) if key.startswith(("model.", "backend."))}
    assert every - free == LlamaFolder(folder).keys.keys()


def test_what_transformers_takes_as_the_same_is_the_same(folder: Path) -> None:
    """Both spellings of a plain RoPE, null where a default holds, slices of an old way to multiply, a copy of a tied
    head, and RoPE's frequencies as old versions saved them."""
    before = from_llama(folder)
    change_config(
        folder, rope_parameters=PLAIN_ROPE, rope_theta=None, head_dim=6, pretraining_tp=2, attention_bias=None
    )
    assert from_llama(folder)[0] == before[0]
    weights = weights_of(folder)
    frequencies = (500.0 ** (-np.arange(0, 6, 2) / 6)).astype(np.float32)
    change_config(folder, tie_word_embeddings=True)
    same = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies,
    }
    put_shards(folder, weights | same)
    overrides, params = from_llama(folder)
    assert overrides["model.embeddings"] == "tied"
    assert "output_embedding" not in params


@pytest.mark.parametrize("given", [None, "text", "1e-5", [], {}, True, -1, 0, 0.5, float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_in_a_line(given: object, folder: Path) -> None:
    numbers = [key for key, value in PUBLISHED.items() if type(value) in (int, float)]
    for key in (*numbers, "head_dim", "rope_parameters", "rope_scaling", "tie_word_embeddings"):
        changed = PUBLISHED | {key: given}
        (folder / "config.json").write_text(json.dumps(changed))
        may_be_null = ("head_dim", "rope_theta", "rope_parameters", "rope_scaling")
        if key == "pretraining_tp" or (key, given) in TAKEN or (given is None and key in may_be_null):
            from_llama(folder)
            continue
        with pytest.raises(BadInput) as error:
            from_llama(folder)
        assert key in str(error.value) or "has shape" in str(error.value)
        assert len(str(error.value).splitlines()) == 1


# A key and a value in the test above that are a model all the same.
TAKEN = [("rope_theta", 0.5), ("rms_norm_eps", 0.5), ("rope_parameters", {}), ("rope_scaling", {})]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"x"', "[" * 100_000])
def test_a_config_that_is_no_json_object_is_told_in_a_line(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json: (must be a JSON object|cannot be read as JSON)"):
        from_llama(folder)


ONES = np.ones((24, 24), np.float32)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model.layers.2.mlp.up_proj.weight": ONES}, r"unknown tensors: model\.layers\.2\.mlp\.up_proj\.weight"),
        ({"model.layers.0.pre_feedforward_layernorm.weight": ONES[0]}, "unknown tensors: .*pre_feedforward_layernorm"),
        ({"model.layers.0.self_attn.q_norm.weight": ONES[0]}, "unknown tensors: .*q_norm"),
        ({"model.layers.0.self_attn.q_proj.bias": ONES[0]}, "unknown tensors: .*q_proj.bias"),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": ONES[0, :3]}, "unknown tensors: .*inv_freq"),
        ({"model.norm.weight": None}, "missing: model.norm.weight"),
        ({"lm_head.weight": None}, "missing: lm_head.weight"),
        ({"model.norm.weight": ONES}, r"model.norm.weight has shape \(24, 24\); by config.json it must be \(24,\)"),
        ({"model.norm.weight": ONES[0].astype(np.int8)}, "model.norm.weight is I8; allowed: F32, F16, BF16"),
        ({"model.norm.weight": ONES[0].astype(ml_dtypes.float8_e4m3fn)}, "model.norm.weight is F8_E4M3; allowed"),
        ({"model.norm.weight": ONES[0] * np.nan}, "not finite: model.norm.weight"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(
    changed: dict[str, np.ndarray | None], told: str, folder: Path
) -> None:
    weights = weights_of(folder) | changed
    put_shards(folder, {name: array for name, array in weights.items() if array is not None})
    with pytest.raises(BadInput, match=told):
        from_llama(folder)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(BadInput, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        from_llama(folder)


def test_shards_that_are_not_what_the_index_says_are_named(folder: Path, tmp_path: Path) -> None:
    """Missing, cut short, of other tensors, or anywhere but beside the index."""
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, second = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, tmp_path / "outside.safetensors")
    name = next(iter(whole["weight_map"]))
    for file in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "", "weights.bin", 3, None):
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | {name: file}}))
        with pytest.raises(BadInput, match=r"which must be a \.safetensors file beside the index"):
            from_llama(folder)
    for damaged in ({}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": [1]}):
        index.write_text(json.dumps(damaged))
        with pytest.raises(BadInput, match="has no weight_map"):
            from_llama(folder)
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"model.extra": first.name}}))
    with pytest.raises(BadInput, match=r"disagree on model\.extra"):
        from_llama(folder)
    index.write_text(json.dumps(whole))
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(BadInput, match=f"{second.name}: not a complete safetensors file"):
        from_llama(folder)
    second.unlink()
    with pytest.raises(BadInput, match=f"lists {second.name}, which does not exist"):
        from_llama(folder)
    index.unlink()
    with pytest.raises(BadInput, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        from_llama(folder)


def test_a_folders_text_is_read_by_its_own_tokenizer(tmp_path: Path) -> None:
    """Which may have fewer tokens than the model, and not more. Without one, tokens that are not bytes are ids."""
    text = train_bpe(iter(["to be or not to be, that is the question\n"] * 9), 270)
    folder = published(tmp_path / "llama", vocab_size=280)
    assert isinstance(xattn.load(folder).tokenizer, IdTokenizer)
    (folder / "tokenizer.json").write_text(text)
    found = xattn.load(folder)
    ids = found.tokenizer.encode("to be")
    assert found.tokenizer.decode(ids) == "to be"
    assert len(ids) < 5
    assert found.model.vocab_size == found.tokenizer.vocab_size == 280
    (folder / "tokenizer.json").write_text(text[:-1])
    with pytest.raises(BadInput, match=r"tokenizer\.json: not a tokenizer\.json"):
        xattn.load(folder)
    small = published(tmp_path / "small", vocab_size=260)
    (small / "tokenizer.json").write_text(text)
    with pytest.raises(BadInput, match="has 270 ids, more than vocab_size = 260"):
        xattn.load(small)


# ---- a run that starts from one --------------------------------------------------------------------------------------


def started(folder: Path, text_file: Path, *overrides: str) -> Config:
    """The config of a short run that starts from a published Llama of bytes, on a text."""
    return compose(
        [
            *(f"{key}={value}" for key, value in KEYS_OF_PUBLISHED.items()),
            *(f"model.init_from={folder}", "data=text", f"data.path={text_file}", "backend.context_length=16"),
            *(
                "trainer=debug",
                "trainer.steps=4",
                "model.layers=scanned",
                "trainer.batch_size=4",
                "evaluation.sequences=8",
            ),
            *("optimizer.learning_rate=1e-2", "tracking.wandb.mode=disabled", *overrides),
        ]
    )


KEYS_OF_PUBLISHED = {
    "model.norm_placement": "pre",
    "model.qk_norm": "none",
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.embedding_dim": 24,
    "model.mlp_dim": 10,
    "model.norm_eps": 1e-5,
    "backend.theta": 500,
}


@pytest.fixture
def of_bytes(tmp_path: Path) -> Path:
    return published(tmp_path / "llama", ml_dtypes.bfloat16, vocab_size=256)


def test_a_published_llama_is_evaluated_and_trained_on(
    of_bytes: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss on held-out text is the formula's, `xattn evaluate FOLDER` and a run that has hardly moved say so; and a
    run that is stopped and resumed ends with the bits of one that was not, without the weights it started from."""
    config = started(of_bytes, text_file, "optimizer.learning_rate=1e-12")
    data = load_data(config.data, Batching(context_length=16, batch_size=4, sequences=8, seed=0))
    losses = []
    for batch in data.held_out:
        logits = llama(of_bytes, batch.inputs)
        of_target = np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        losses.append((np.log(np.exp(logits).sum(-1)) - of_target)[batch.weights > 0])
    loss = float(np.concatenate(losses).mean())
    overrides = ["data=text", f"data.path={text_file}", "evaluation.sequences=8", "backend.context_length=16"]
    assert main(["evaluate", str(of_bytes), *overrides, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert run(config, tmp_path / "still", quiet=True) == ExitCode.DONE
    assert summary_of(tmp_path / "still")["val_loss"] == pytest.approx(loss, rel=1e-5)

    config = started(of_bytes, text_file)
    assert run(config, tmp_path / "whole", quiet=True) == ExitCode.DONE
    assert summary_of(tmp_path / "whole")["val_loss"] < loss - 0.01
    asked = iter([False])
    assert run(config, tmp_path / "cut", quiet=True, stop=lambda: next(asked, True)) == ExitCode.PREEMPTED
    assert summary_of(tmp_path / "cut")["step"] == 2
    shutil.rmtree(of_bytes)
    assert run(load(tmp_path / "cut" / run_folder.CONFIG), tmp_path / "cut", quiet=True) == ExitCode.DONE
    assert summary_of(tmp_path / "cut")["state_sha256"] == summary_of(tmp_path / "whole")["state_sha256"]


def summary_of(folder: Path) -> dict[str, Any]:
    found = run_folder.read_summary(folder)
    assert found is not None
    return found


def test_a_run_is_named_by_the_weights_it_starts_from(of_bytes: Path, text_file: Path, tmp_path: Path) -> None:
    """Not by where they lie; and its config.yaml is read without them."""
    config = started(of_bytes, text_file)
    assert run_name(config) != run_name(config.model_copy(update={"model": compose().model}))
    moved = of_bytes.rename(tmp_path / "moved")
    assert run_name(started(moved, text_file)) == run_name(config)
    (tmp_path / "config.yaml").write_text(save(config))
    assert load(tmp_path / "config.yaml") == config
    weights = weights_of(moved)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    put_shards(moved, weights)
    assert run_name(started(moved, text_file)) != run_name(config)


def test_a_run_that_cannot_start_from_its_weights_is_refused(of_bytes: Path, text_file: Path, tmp_path: Path) -> None:
    """Keys of another model, no folder, a vocabulary of other data, weights that changed since: nothing is begun."""
    with pytest.raises(BadInput, match=r"model\.init_from = nowhere: no such folder"):
        started(Path("nowhere"), text_file)
    with pytest.raises(BadInput, match=r"model\.init_from = 3: must be the path of a folder"):
        compose(["model.init_from=3"])
    other = started(of_bytes, text_file, "model.norm_eps=1e-6", "backend.theta=1", "backend.window=4")
    told = r"another model; give backend\.window=null model\.norm_eps=1e-05 backend\.theta=500\.0$"
    with pytest.raises(BadInput, match=told):
        run(other, tmp_path / "run", quiet=True)
    with pytest.raises(BadInput, match=rf"nothing was started \(1 run\): .*{told}"):
        check_data([Job(other, tmp_path / "run")])
    with pytest.raises(BadInput, match="its vocabulary has 256 tokens, but the data's has 257"):
        run(started(of_bytes, text_file, "data.documents=separated"), tmp_path / "run", quiet=True)
    config = started(of_bytes, text_file)
    weights = weights_of(of_bytes)
    put_shards(of_bytes, weights | {"model.norm.weight": weights["model.norm.weight"] * 2})
    with pytest.raises(IntegrityError, match="have changed since this run was named"):
        initial_weights(config)
    assert not (tmp_path / "run" / run_folder.CONFIG).exists()
