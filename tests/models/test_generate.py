"""Generation from a cache against recomputing the whole text at every step, and what ends a text."""

import collections
import dataclasses
import functools
import io

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import DecoderConfig, LongRope, Model, logits
from xtoken_jax.models.generate import _empty, _read, check_settings, cut_at_stop, generate
from xtoken_jax.models.sampling import nucleus

PLAIN = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, initializer_range=0.3,
)  # fmt: skip
LONG = LongRope((1.0, 1.1, 1.2, 1.3), (2.0, 5.0, 9.0, 20.0), 16, 1.2)
CONFIGS = {
    "plain": PLAIN,
    "sliding": dataclasses.replace(PLAIN, sliding_window=5),
    "gemma2": dataclasses.replace(
        PLAIN, sliding_window=4, unit_offset_norms=True, post_norms=True, scale_embedding=True,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"), query_pre_attn_scalar=16.0,
        attention_softcap=5.0, logit_softcap=3.0, activation="gelu_tanh",
    ),
    "gemma3": dataclasses.replace(
        PLAIN, sliding_window=4, unit_offset_norms=True, post_norms=True, scale_embedding=True, qk_norm=True,
        layer_types=("sliding_attention", "sliding_attention", "full_attention"), rope_theta=1e6,
        sliding_rope_theta=1e4, activation="gelu_tanh",
    ),
    "longrope": dataclasses.replace(PLAIN, rope_scaling=LONG),
}  # fmt: skip


@functools.cache
def load(name):
    model = Model(CONFIGS[name])
    return model, model.init(jax.random.key(1))


def ragged(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, length).tolist() for length in lengths]


PROMPTS = ragged(3, 1, 12, 7, 5)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, place, positions):
    """Scores behind a text, padded on the right."""
    hidden, unembedding = model(params, tokens, positions=positions)
    return logits(hidden[:, place][:, None], unembedding, softcap=model.config.logit_softcap)[0, 0]


def next_scores(model, params, text):
    # the positions of the padding stay within the text's own, by which LongRoPE judges the length
    length = 64 if len(text) <= 64 else 640
    positions = np.minimum(np.arange(length), len(text) - 1)[None]
    padded = np.array([[*text, *[0] * (length - len(text))]], np.int32)
    return np.asarray(forward(model, params, padded, len(text) - 1, positions))


def recomputed(model, params, prompt, count, size=64, eos_ids=()):
    """Greedy tokens, the whole text through the model for each."""
    text = list(prompt)
    while len(text) < len(prompt) + count:
        scores = next_scores(model, params, text)[:size]
        # a tie would make the test one of rounding
        assert np.diff(np.sort(scores)[-2:])[0] > 1e-4
        token = int(scores.argmax())
        if token in eos_ids:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_what_recomputing_the_whole_text_gives(name):
    """Past a block of 32 tokens; for LongRoPE past 16 positions, in, at and before the prompt's end."""
    model, params = load(name)
    prompts = [*PROMPTS, *ragged(15, 16, 17, 20)]
    found = generate(model, params, prompts, max_new_tokens=36, batch_size=4)
    for prompt, new in zip(prompts, found, strict=True):
        assert new == recomputed(model, params, prompt, 36)
        assert len(set(new)) > 1  # the model has more than one thing to say


def test_a_prompt_of_several_pieces():
    model, params = load("sliding")
    prompts = ragged(600, 300, 260, 2)
    found = generate(model, params, prompts, max_new_tokens=3)
    assert found == [recomputed(model, params, prompt, 3) for prompt in prompts]


def test_longrope_splits_where_the_text_passes_the_pretrained_length():
    model, params = load("longrope")
    short = dataclasses.replace(LONG, original_max_position_embeddings=10**6)
    never = Model(dataclasses.replace(model.config, rope_scaling=short))
    prompts = ragged(4, 16, 17)
    found = generate(model, params, prompts, max_new_tokens=20)
    before = generate(never, params, prompts, max_new_tokens=20)
    # a text of 16 tokens still has the short factors, so 13 and 1 new tokens are theirs
    assert [a[:n] for a, n in zip(found, (13, 1, 0), strict=True)] == [
        b[:n] for b, n in zip(before, (13, 1, 0), strict=True)
    ]
    assert found[0] != before[0]
    assert found[1] != before[1]
    assert found[2] != before[2]
    # each prompt is split by its own length, whatever else is in the batch
    for prompt, new in zip(prompts, found, strict=True):
        assert generate(model, params, [prompt], max_new_tokens=20) == [new]


def test_longrope_keeps_random_numbers_and_stop_strings_across_the_split():
    model, params = load("longrope")
    common = {"max_new_tokens": 20, "temperature": 1.0, "key": jax.random.key(3)}
    prompts = ragged(10, 12)
    whole = generate(model, params, prompts, **common)
    word = show(whole[0][5:8])  # tokens 5 to 7, the last of which is on the other side
    found = generate(model, params, prompts, **common, stop=[word], decode=show)
    assert found[0] == whole[0][:8]
    assert found[1] == whole[1]


def show(ids):
    """A letter for each id: text whose stop strings are runs of tokens."""
    return "".join(chr(0x4E00 + int(i)) for i in ids)


def pairs(ids):
    """Several letters to an id, so that a stop string begins and ends inside tokens."""
    return "".join(f"<{int(i)}>" for i in ids)


def test_eos_ends_a_row_alone_and_is_not_in_the_result():
    model, params = load("plain")
    whole = generate(model, params, PROMPTS, max_new_tokens=40)
    eos = [whole[0][3], whole[2][35]]
    found = generate(model, params, PROMPTS, max_new_tokens=40, eos_ids=eos)
    for before, after in zip(whole, found, strict=True):
        ends = [before.index(e) for e in eos if e in before]
        assert after == before[: min(ends, default=40)]
    assert len({len(new) for new in found}) > 1
    # a row that ends with its very last token is shorter than asked, and so is seen to have ended
    last = generate(model, params, PROMPTS[:1], max_new_tokens=4, eos_ids=eos[:1])
    assert last == [whole[0][:3]]
    assert generate(model, params, PROMPTS, max_new_tokens=0) == [[]] * 5
    assert generate(model, params, [], max_new_tokens=4) == []


def test_stop_strings_end_where_looking_after_every_token_would():
    model, params = load("plain")
    whole = generate(model, params, PROMPTS, max_new_tokens=70)
    for block in (0, 30, 33):  # in the first block, over the border of two, in the second
        ids = whole[0][block : block + 4]
        first = show(whole[0]).index(show(ids)) + len(ids)  # the run may have occurred before
        found = generate(model, params, PROMPTS, max_new_tokens=70, stop=[show(ids), "never"], decode=show)
        assert found[0] == whole[0][:first]
        for other, new in zip(whole[1:], found[1:], strict=True):
            assert show(new) == show(other)[: len(new)]
            assert len(new) == 70 or show(new).endswith(show(ids))
    # of two that overlap, the one that is complete first
    a, b, c = whole[0][:3]
    found = generate(
        model, params, PROMPTS[:1], max_new_tokens=70, stop=[show([a, b, c]), show([b])], decode=show
    )
    assert found == [[a, b]]
    assert cut_at_stop(show(found[0]), [show([a, b, c]), show([b])]) == show([a])
    # a stop string inside of tokens
    word = f"{a}><{b}"
    found = generate(model, params, PROMPTS[:1], max_new_tokens=70, stop=[word], decode=pairs)
    assert found == [[a, b]]
    assert cut_at_stop(pairs(found[0]), [word]) == "<"


def test_text_is_cut_at_the_earliest_stop_string():
    assert cut_at_stop("a;b\nc", ["\n", ";"]) == "a"
    assert cut_at_stop("a;b\nc", ["\n"]) == "a;b"
    assert cut_at_stop("abc", ["\n", "bcd"]) == "abc"
    assert cut_at_stop("abc", []) == "abc"


def test_the_nucleus_is_the_smallest_set_with_the_probability():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, (6, 50)).astype(np.float32)
    scores[:, 45:] = -np.inf
    scores[5, :10] = 20.0  # ties: as likely as the last one needed, all stay
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        found = np.asarray(nucleus(jnp.asarray(scores), top_p))
        for row, kept in zip(scores.astype(np.float64), np.isfinite(found), strict=True):
            shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            order = np.argsort(-shares, kind="stable")
            needed = 1 + int(np.searchsorted(np.cumsum(shares[order]), top_p - 1e-7))
            least = shares[order[needed - 1]]
            np.testing.assert_array_equal(kept, shares >= least)
        np.testing.assert_array_equal(found[np.isfinite(found)], scores[np.isfinite(found)])
    assert np.isfinite(nucleus(jnp.asarray(scores), 0.0)).sum(-1).tolist() == [1] * 5 + [10]


@pytest.mark.parametrize(
    ("name", "temperature", "top_p", "size"),
    [("gemma2", 1.0, 1.0, 64), ("plain", 0.7, 1.0, 50), ("plain", 1.3, 0.8, 64)],
)
def test_samples_have_the_models_distribution(name, temperature, top_p, size):
    """Soft cap, temperature, the cut tail and the tokenizer's size."""
    model, params = load(name)
    prompt, count = PROMPTS[3], 4096
    new = generate(
        model, params, [prompt] * count, max_new_tokens=1, temperature=temperature, top_p=top_p, size=size,
        key=jax.random.key(0), batch_size=1024, length_multiple=8,
    )  # fmt: skip
    scores = next_scores(model, params, prompt).astype(np.float64)[:size] / temperature
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    order = np.argsort(-shares)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(shares[order]), top_p))] if top_p < 1 else order
    expected = np.zeros(size)
    expected[kept] = shares[kept] / shares[kept].sum()
    seen = np.bincount([ids[0] for ids in new], minlength=size)
    assert len(seen) == size
    assert seen[expected == 0].sum() == 0
    # chi-square over tokens expected at least 5 times, the others as one
    often = expected * count >= 5
    o = np.append(seen[often], seen[~often].sum())
    e = np.append(expected[often], expected[~often].sum()) * count
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    assert freedom >= 5
    chi_square = ((o - e) ** 2 / e).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_samples_depend_on_the_key_and_the_place_and_not_on_the_batch():
    model, params = load("plain")
    prompts = [*PROMPTS, PROMPTS[0]]
    common = {"max_new_tokens": 40, "temperature": 1.0, "top_p": 0.95}
    found = generate(model, params, prompts, **common, key=jax.random.key(0))
    for batch_size in (1, 4):
        assert found == generate(
            model, params, prompts, **common, key=jax.random.key(0), batch_size=batch_size, length_multiple=16
        )
    assert found != generate(model, params, prompts, **common, key=jax.random.key(1))
    assert found[0] != found[-1]  # the same prompt at another place
    cold = generate(model, params, prompts, max_new_tokens=40, temperature=1e-50, key=jax.random.key(0))
    assert cold == generate(model, params, prompts, max_new_tokens=40)


def test_ids_of_no_token_are_never_chosen():
    model, params = load("plain")
    greedy = generate(model, params, PROMPTS, max_new_tokens=8, size=10)
    assert greedy == [recomputed(model, params, p, 8, size=10) for p in PROMPTS]
    hot = generate(
        model, params, PROMPTS, max_new_tokens=40, size=10, temperature=50.0, key=jax.random.key(0)
    )
    assert set().union(*hot) == set(range(10))


@dataclasses.dataclass(frozen=True)
class Counting(Model):
    """Counts how often its `extend` is traced."""

    def extend(self, params, tokens, cache, **kwargs):
        TRACES[tokens.shape] += 1
        return super().extend(params, tokens, cache, **kwargs)


TRACES = collections.Counter()


@pytest.fixture
def compiled():
    """What has been compiled so far."""
    names = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("mesh", [None, (2, 4, 1)])
def test_a_second_call_of_about_the_size_compiles_nothing(mesh, compiled):
    model = Counting(dataclasses.replace(PLAIN, norm_eps=1e-6 if mesh is None else 2e-6))
    common = {"batch_size": 8, "temperature": 0.5, "top_p": 0.5, "length_multiple": 16}

    def run():
        TRACES.clear()
        generate(model, params, ragged(*range(3, 16)), max_new_tokens=40, key=jax.random.key(0), **common)
        assert TRACES
        assert compiled
        TRACES.clear()
        compiled.clear()
        other = {**common, "temperature": 2.0, "top_p": 0.9}
        generate(
            model, params, ragged(*range(2, 14), seed=1), max_new_tokens=35, key=jax.random.key(1), **other
        )
        assert (TRACES, compiled) == ({}, [])

    if mesh is None:
        params = model.init(jax.random.key(0))
        run()
    else:
        mesh = make_mesh(MeshConfig(*mesh))
        with jax.set_mesh(mesh):
            params = jax.jit(model.init, out_shardings=model.param_shardings(mesh))(jax.random.key(0))
            run()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gemma2", (2, 4, 1)), ("longrope", (8, 1, 1)), ("gemma3", (1, 4, 2))],
)
def test_any_mesh_gives_one_devices_tokens(name, shape):
    model, params = load(name)
    settings = [{}, {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(0)}]
    alone = [generate(model, params, PROMPTS, max_new_tokens=20, size=60, **s) for s in settings]
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, model.param_shardings(mesh))
        # batches of 3 do not divide by the devices
        found = [
            generate(model, params, PROMPTS, max_new_tokens=20, size=60, batch_size=3, **s) for s in settings
        ]
    assert found == alone


def test_the_cache_is_split_and_given_back():
    model, params = load("plain")
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, model.param_shardings(mesh))
        cache = _empty(model, 8, 24)
        assert {s.data.shape for s in cache.key.addressable_shards} == {(3, 2, 24, 1, 8)}
        ones = np.ones((8, 16), np.int32)
        after = _read(model, params, cache, ones, ones > 0, ones.cumsum(-1) - 1)
    assert cache.key.is_deleted()
    assert cache.value.is_deleted()
    assert {s.data.shape for s in after.key.addressable_shards} == {(3, 2, 24, 1, 8)}


def test_a_bar_for_several_batches():
    model, params = load("plain")
    shown = []
    for batch_size in (2, 8):
        console = Console(file=io.StringIO(), width=80, force_terminal=True)
        generate(model, params, PROMPTS, max_new_tokens=2, batch_size=batch_size, console=console)
        shown.append(console.file.getvalue())
    assert "5/5" in shown[0]
    assert shown[1] == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0}, "needs a key"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"length_multiple": 0}, "length_multiple=0"),
        ({"stop": "\n", "decode": show}, "list of strings"),
        ({"stop": [""], "decode": show}, "none of them empty"),
        ({"stop": ["\n"]}, "need decode"),
        ({"size": 65}, "has 64 ids"),
        ({"size": 0}, "size=0"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1], [2, 64]]}, r"prompts\[1\] has id 64"),
        ({"prompts": [[-1]]}, r"prompts\[0\] has id -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    model, params = load("plain")
    arguments = {"prompts": PROMPTS, "max_new_tokens": 2, **settings}
    with pytest.raises(UserError, match=words):
        generate(model, params, arguments.pop("prompts"), **arguments)


def test_settings_can_be_checked_before_there_is_a_model():
    check_settings(max_new_tokens=0, temperature=0.7, top_p=0.9, stop=["\n"])
    with pytest.raises(UserError, match=r"top_p=2"):
        check_settings(max_new_tokens=1, top_p=2)
