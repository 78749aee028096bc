"""The decoder, its sizes, reproducible building, and the contract for models that users bring."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diloco.errors import ConfigError
from diloco.worker.model import (
    PRESETS,
    ModelConfig,
    Transformer,
    build_from_factory,
    build_model,
    next_token_loss,
    preset_config,
    rope_tables,
    rotate,
)

torch.set_num_threads(1)

CONFIG = ModelConfig(64, 32, 2, 4, 2, 48, 16)


def tokens(batch: int, length: int, vocab: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def seeded(config: ModelConfig, seed: int = 0) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(config)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("nano", 0.2e6),
        ("tiny", 0.85e6),
        ("moe-tiny", 1.7e6),
        ("small", 2.8e6),
        ("10m", 10e6),
        ("160m", 160e6),
        ("1b", 1e9),
        ("8b", 8.03e9),
    ],
)
def test_a_preset_has_about_as_many_parameters_as_its_name_says(preset: str, expected: float) -> None:
    """Within 20 % for all, within 1 % for 8b, whose sizes are those of a published model; no memory is used."""
    model = build_model(preset, 128, 0, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(expected, rel=0.01 if preset == "8b" else 0.2)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_preset_is_covered_above() -> None:
    """A preset added without a size check would go unnoticed."""
    assert set(PRESETS) == {"nano", "tiny", "moe-tiny", "small", "10m", "160m", "1b", "8b"}
    assert PRESETS["tiny"].vocab_size == 256 and PRESETS["tiny"].n_layers >= 4


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_outside_blocks_are_embedding_head_and_norm_alone(tied: bool) -> None:
    """Fragment plans find whole blocks by `blocks.<i>.`; a tied head is no parameter of its own."""
    model = Transformer(replace(CONFIG, tied=tied))
    names = {name for name, _ in model.named_parameters()}
    outside = {name for name in names if not name.startswith("blocks.")}
    assert outside == {"embed.weight", "norm.weight"} | (set() if tied else {"head.weight"})
    assert {name.split(".")[1] for name in names - outside} == {"0", "1"}
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_a_future_token_changes_no_earlier_logits(changed: int) -> None:
    """Causality: logits before the changed position are the same bits, from it on they differ."""
    model = seeded(CONFIG)
    before = tokens(2, 16)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % 64
    with torch.no_grad():
        first, second = model(before), model(after)
    assert torch.equal(first[:, :changed], second[:, :changed])
    assert (first[:, changed:] != second[:, changed:]).any(dim=-1).all()


def test_grouped_query_attention_is_full_attention_with_repeated_keys_and_values() -> None:
    """A model with one key-value head per query head, whose heads repeat the groups', computes the same."""
    grouped = seeded(CONFIG)
    full = Transformer(replace(CONFIG, n_kv_heads=CONFIG.n_heads))
    state = grouped.state_dict()
    repeat = CONFIG.n_heads // CONFIG.n_kv_heads
    for layer in range(CONFIG.n_layers):
        name = f"blocks.{layer}.qkv.weight"
        query, key, value = state[name].split([32, 16, 16])
        wide = [
            part.view(CONFIG.n_kv_heads, CONFIG.head_dim, -1).repeat_interleave(repeat, 0).flatten(0, 1)
            for part in (key, value)
        ]
        state[name] = torch.cat([query, *wide])
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(full(tokens(2, 16)), grouped(tokens(2, 16)))


def test_rotated_scores_depend_on_the_distance_between_positions_alone() -> None:
    """q at position t times k at position s is the same for every t - s, and changes with the distance (RoPE)."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 8, generator=generator).expand(1, 12, 1, 8) for _ in range(2))
    cos, sin = rope_tables(12, 8, 100.0)
    scores = torch.einsum("bthd,bshd->ts", rotate(query, cos, sin), rotate(key, cos, sin))
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert len({round(score, 4) for score in scores[0].tolist()}) == 12


def test_the_order_of_earlier_tokens_matters() -> None:
    """Attention without positions could not tell two orders of the past apart; one layer of ours does."""
    model = seeded(replace(CONFIG, n_layers=1))
    row = torch.arange(12)[None]
    swapped = row.clone()
    swapped[0, :2] = torch.tensor([1, 0])
    with torch.no_grad():
        assert not torch.allclose(model(swapped)[0, -1], model(row)[0, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", ["nano", "tiny", "moe-tiny"])
def test_the_same_seed_gives_the_same_weights_and_leaves_global_randomness_alone(preset: str) -> None:
    """Weights depend on (sizes, seed) alone, another seed gives others, torch's global stream does not move."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_model(preset, 32, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second, other = build_model(preset, 32, 3), build_model(preset, 32, 4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.embed.weight, other.embed.weight)


@pytest.mark.parametrize("preset", ["tiny", "moe-tiny"])
def test_initial_weights_have_the_documented_spread(preset: str) -> None:
    """N(0, 0.02), residual outputs divided by sqrt(2 L), gains one; the first loss is that of a uniform guess."""
    model = build_model(preset, 64, 0)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value))
        else:
            residual = name.endswith(("attn_out.weight", "ffn_out.weight", "experts.out"))
            expected = 0.02 / (8**0.5 if residual else 1.0)
            assert value.detach().std().item() == pytest.approx(
                expected, rel=0.03 if value.numel() > 2000 else 0.1
            )
    assert model.loss(tokens(4, 65, 256)).item() == pytest.approx(5.55, abs=0.2)


def test_length_and_vocabulary_are_those_asked_for() -> None:
    """Logits have the given vocabulary; more tokens than the model was built for is an error that says so."""
    model = build_model("nano", 16, 0, vocab_size=300)
    assert model(tokens(2, 9)).shape == (2, 9, 300)
    with pytest.raises(ValueError, match="17 tokens given to a model built for 16"):
        model(tokens(1, 17))


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_token() -> None:
    """loss(tokens) agrees with the definition written out, and is fp32 whatever the weights are."""
    model = seeded(CONFIG)
    rows = tokens(3, 11)
    with torch.no_grad():
        log_p = model(rows[:, :-1]).log_softmax(-1)
        expected = -log_p.gather(-1, rows[:, 1:, None]).mean()
        torch.testing.assert_close(model.loss(rows), expected)
        assert model.to(torch.bfloat16).loss(rows).dtype == torch.float32


def test_the_loss_falls_on_a_repeated_batch() -> None:
    """Twenty AdamW steps on one batch lower its loss by more than a nat per token: every gradient flows."""
    model = build_model("nano", 32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = tokens(4, 33, 256)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1.0
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_an_unknown_preset_suggests_the_nearest() -> None:
    """The error names key, value and a way out."""
    with pytest.raises(ConfigError, match=r"model\.preset = 'tinny'.*did you mean 'tiny'"):
        preset_config("tinny")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 30, 2, 4, 2, 48, 16), "d_model = 30"),
        ((64, 32, 2, 4, 3, 48, 16), "n_kv_heads = 3"),
        ((0, 32, 2, 4, 2, 48, 16), "vocab_size = 0"),
        ((64, 32, 2, 4, 2, 48, -1), "sequence_length = -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    sizes: tuple[int, int, int, int, int, int, int], message: str
) -> None:
    """Impossible sizes are named before any memory is taken."""
    with pytest.raises(ConfigError, match=message):
        ModelConfig(*sizes)


FACTORY = """
import torch
from torch import nn

class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 64)
    def forward(self, tokens):
        return self.table(tokens)

def bigram():
    return Bigram()

def nothing():
    return None
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_models", raising=False)
    return "their_models"


def test_a_factory_is_found_by_name_and_seeded(factory_module: str) -> None:
    """The same seed gives the same model, the global stream is put back, logits alone are enough for a loss."""
    state = torch.get_rng_state()
    first = build_from_factory(f"{factory_module}:bigram", 1)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (build_from_factory(f"{factory_module}:bigram", seed) for seed in (1, 2))
    (weight,), (same,), (differs,) = (list(model.parameters()) for model in (first, again, other))
    assert torch.equal(weight, same) and not torch.equal(weight, differs)
    rows = tokens(2, 9)
    expected = nn.functional.cross_entropy(weight[rows[:, :-1]].flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(next_token_loss(first, rows), expected)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("", "write it as 'package.module:function'"),
        (":bigrm", "has no function 'bigrm'.*did you mean 'bigram'"),
        (":nothing", "returned NoneType"),
        ("_gone:bigram", "cannot import 'their_models_gone'"),
    ],
)
def test_a_factory_that_is_not_there_is_a_configuration_error(
    factory_module: str, suffix: str, message: str
) -> None:
    """Each way to get the name wrong has its own message, with the key in it."""
    with pytest.raises(ConfigError, match=f"model.factory = .*{message}"):
        build_from_factory(factory_module + suffix, 0)


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, tokens: Tensor) -> object:
        return self.value


def test_logits_may_come_as_an_attribute_of_the_output() -> None:
    """Models in the style of transformers return an object with `.logits`; equal logits give log(V)."""
    logits = torch.zeros(2, 8, 64)
    loss = next_token_loss(Returns(SimpleNamespace(logits=logits)), tokens(2, 9))
    assert float(loss) == pytest.approx(4.158883)


@pytest.mark.parametrize("value", [None, torch.zeros(2, 64), torch.zeros(2, 9, 64), (torch.zeros(2, 8, 64),)])
def test_a_model_without_loss_or_logits_is_refused(value: object) -> None:
    """Outputs of another kind or shape are named, not scored by accident."""
    with pytest.raises(ConfigError, match=r"Returns has no loss\(tokens\) and returns no logits"):
        next_token_loss(Returns(value), tokens(2, 9))
