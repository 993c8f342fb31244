from __future__ import annotations

import pytest
import torch

from fastlm.ops import OPS, rotary, rotary_tables
from fastlm.ops.rotary import reference
from tests.ops.helpers import assert_as_exact_as, compile_for_chips, poisoned_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=OPS["rotary"].backends)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTLM_BACKEND", request.param)
    return request.param


def served(backend, device, dtype):
    if backend == "cpu" and (device == "cuda" or dtype == torch.float16):
        x, table = torch.empty(1, 1, 2, dtype=dtype, device=device), torch.empty(1, 1, device=device)
        assert OPS["rotary"].explain(x, x, table, table).chosen is None
        return False
    return True


def inputs(shape, kv_heads, dtype, device):
    q = torch.randn(shape, device=device).to(dtype).requires_grad_()
    k = torch.randn((*shape[:-2], kv_heads, shape[-1]), device=device).to(dtype).requires_grad_()
    return q, k


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 80), (8, 8, 64)])
def test_half_split_equals_transformers_llama(backend, device, heads, kv_heads, head_dim):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, head_dim=head_dim, max_position_embeddings=64
    )
    q, k = inputs((2, 11, heads, head_dim), kv_heads, torch.float32, device)
    positions = torch.arange(11, device=device)[None]
    cos, sin = LlamaRotaryEmbedding(config).to(device)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    tables = rotary_tables(head_dim, 64, config.rope_parameters["rope_theta"], device=device)
    for ours, theirs in zip(rotary(q, k, *tables), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_interleaved_partial_rotation_equals_transformers_gptj(backend, device):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    q, k = inputs((2, 9, 3, 24), 3, torch.float32, device)
    rotary_dim = 16
    table = create_sinusoidal_positions(9, rotary_dim).to(device)
    sin, cos = table[None].expand(2, -1, -1).split(rotary_dim // 2, -1)
    for ours, x in zip(
        rotary(q, k, *rotary_tables(rotary_dim, 9, device=device), interleaved=True), (q, k), strict=True
    ):
        rotated = apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
        torch.testing.assert_close(ours, torch.cat((rotated, x[..., rotary_dim:]), -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "kv_heads", "rotary_dim"),
    [((1, 1, 1, 24), 1, 2), ((2, 7, 5, 48), 1, 20), ((13, 4, 64), 2, 64), ((2, 3, 40, 128), 8, 128)],
)
def test_forward_and_backward_match_float64(backend, device, shape, kv_heads, rotary_dim, dtype, interleaved):
    if not served(backend, device, dtype):
        return
    cos, sin = rotary_tables(rotary_dim, 32, device=device)
    positions = torch.randint(0, 32, shape[:-2], device=device)
    tensors = inputs(shape, kv_heads, dtype, device)
    grads = [torch.randn_like(t) for t in tensors]

    def run(function, cast):
        q, k = (t.detach().to(cast).requires_grad_() for t in tensors)
        table_dtype = torch.promote_types(cast, torch.float32) if function is not plain else cast
        out = function(q, k, cos.to(table_dtype), sin.to(table_dtype), interleaved=interleaved, positions=positions)
        return [*out, *torch.autograd.grad(out, (q, k), [g.to(cast) for g in grads])]

    with poisoned_memory():
        ours = run(rotary, dtype)
    # Triton's interpreter truncates to bf16 where a chip rounds: twice the error.
    factor = 4.0 if backend == "triton" and device == "cpu" and dtype == torch.bfloat16 else 2.0
    for a, b, c in zip(ours, run(plain, dtype), run(reference.rotary, torch.float64), strict=True):
        assert_as_exact_as(a, b, c, factor)


def plain(q, k, cos, sin, *, interleaved, positions):
    """The usual rotate_half, in the input's own precision."""
    cos, sin = (t[positions][..., None, :] for t in (cos, sin))
    half = cos.shape[-1]

    def rotate(x):
        rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
        if interleaved:
            cos2, sin2 = (t.repeat_interleave(2, -1) for t in (cos, sin))
            turned = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
        else:
            cos2, sin2 = (torch.cat((t, t), -1) for t in (cos, sin))
            turned = torch.cat((-rotated[..., half:], rotated[..., :half]), -1)
        return torch.cat((rotated * cos2 + turned * sin2, rest), -1)

    return rotate(q), rotate(k)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(backend, device, interleaved):
    q, k = (torch.randn(1, 1, 16, 32, device=device) for _ in range(2))
    tables = rotary_tables(32, 100, device=device)

    def score(query_at, key_at):
        at = torch.tensor([query_at], device=device), torch.tensor([key_at], device=device)
        rotated_q = rotary(q, q, *tables, interleaved=interleaved, positions=at[0])[0]
        rotated_k = rotary(k, k, *tables, interleaved=interleaved, positions=at[1])[0]
        return (rotated_q * rotated_k).sum(-1)

    torch.testing.assert_close(score(7, 2), score(95, 90), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(7, 2), score(7, 3), rtol=1e-3)


def test_position_shapes_and_dtypes_agree(backend, device):
    q, k = inputs((2, 6, 2, 16), 1, torch.float32, device)
    tables = rotary_tables(16, 6, device=device)
    expected = rotary(q, k, *tables)
    one = torch.arange(6, device=device)
    for positions in (one, one.int(), one.expand(2, 6), one.repeat(2, 2)[:, ::2] * 0 + one):
        for a, b in zip(rotary(q, k, *tables, positions=positions), expected, strict=True):
            assert torch.equal(a, b)
    packed = rotary(q.flatten(0, 1), k.flatten(0, 1), *tables, positions=one.repeat(2))
    assert torch.equal(packed[0].view_as(q), expected[0])


def test_slices_of_a_fused_projection_are_read_where_they_lie(backend, device):
    fused = torch.randn(2, 5, 4 + 2 + 2, 16, device=device)
    q, k, _ = fused.split((4, 2, 2), 2)
    tables = rotary_tables(16, 5, device=device)
    for a, b in zip(rotary(q, k, *tables), rotary(q.clone(), k.clone(), *tables), strict=True):
        assert torch.equal(a, b)
    q, k = (torch.randn(2, 4, 5, 32, device=device)[..., ::2].transpose(1, 2) for _ in range(2))
    for a, b in zip(rotary(q, k, *tables), reference.rotary(q, k, *tables), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


def test_no_tokens_give_no_tokens(backend, device):
    q, k = inputs((2, 0, 4, 16), 2, torch.float32, device)
    rotated_q, rotated_k = rotary(q, k, *rotary_tables(16, 4, device=device))
    assert rotated_q.shape == (2, 0, 4, 16)
    assert rotated_k.shape == (2, 0, 2, 16)


def test_backward_of_backward_is_the_rotation_itself(device):
    q, k = inputs((1, 4, 2, 8), 1, torch.float64, device)
    tables = [t.double() for t in rotary_tables(8, 4, device=device)]
    assert torch.autograd.gradgradcheck(lambda q, k: rotary(q, k, *tables), (q, k))


@pytest.mark.parametrize("positions", [None, torch.tensor([3, 1, 2])])
def test_torch_accepts_the_registration(device, positions):
    q, k = inputs((2, 3, 2, 16), 1, torch.float32, device)
    positions = positions if positions is None else positions.to(device)
    arguments = (q, k, *rotary_tables(16, 4, device=device), positions, False, False)
    torch.library.opcheck(torch.ops.fastlm.rotary.default, arguments)


def test_traces_into_one_graph(device):
    q, k = inputs((2, 3, 2, 16), 1, torch.float32, device)
    tables = rotary_tables(16, 4, device=device)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, *tables), rotary(q, k, *tables), strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_that_do_not_fit_are_named(backend):
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
    cos, sin = rotary_tables(16, 5)
    with pytest.raises(ValueError, match="the tables hold 2 positions, but q has 3"):
        rotary(q, k, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="q and k must be"):
        rotary(q, k[:1], cos, sin)
    with pytest.raises(ValueError, match="tables rotate 32 dimensions, but head_dim is 16"):
        rotary(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
    with pytest.raises(ValueError, match="positions must be int64 or int32"):
        rotary(q, k, cos, sin, positions=torch.zeros(4, dtype=torch.int64))
    for position in (-1, 5, 2**40):
        with pytest.raises(ValueError, match=r"positions must lie in \[0, 5\)"):
            rotary(q, k, cos, sin, positions=torch.tensor([0, position, 1]))
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        rotary_tables(7, 4)


@pytest.mark.gpu
def test_position_outside_the_tables_gives_nan_on_a_gpu():
    q = torch.randn(3, 2, 16, device="cuda")
    rotated, _ = rotary(q, q, *rotary_tables(16, 4, device="cuda"), positions=torch.tensor([0, 9, -1], device="cuda"))
    assert rotated.isnan().flatten(1).all(1).tolist() == [False, True, True]


@pytest.mark.aot
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (256, 256), (80, 32)])
def test_kernel_compiles_for_each_chip_without_spills(interleaved, head_dim, rotary_dim):
    from fastlm.ops.rotary import triton as kernels

    pointers = dict.fromkeys(["q_ptr", "k_ptr", "rotated_q_ptr", "rotated_k_ptr"], "*bf16")
    pointers |= dict.fromkeys(["cos_ptr", "sin_ptr"], "*fp32") | {"positions_ptr": "*i64", "sign": "fp32"}
    block_half = 1 << (rotary_dim // 2 - 1).bit_length()
    rest = head_dim - rotary_dim
    constants = {
        "HAS_POSITIONS": True,
        "INTERLEAVED": interleaved,
        "BLOCK_Q_HEADS": kernels._block_heads(32, block_half),
        "BLOCK_K_HEADS": kernels._block_heads(8, block_half),
        "BLOCK_HALF": block_half,
        "BLOCK_REST": 1 << (rest - 1).bit_length() if rest else 0,
    }
    scalars = {name: "i32" for name in kernels._kernel.arg_names if name not in pointers | constants}
    for compiled in compile_for_chips(kernels._kernel, pointers | scalars, constants):
        assert compiled.spill_bytes == 0, compiled.chip
