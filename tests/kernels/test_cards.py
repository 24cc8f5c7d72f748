"""Which card gets which kernels, decided by what torch says of it. That they fit there: tests/kernels/aot/every_card.py
and the rehearsal on a pretended card."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from minivlm2vec_kernels import attention_backward_triton, attention_triton, cards, linear_triton, ops

HEAD_DIMS = [16, 32, 48, 64, 80, 96, 128, 144, 160, 192]


@pytest.fixture
def on(monkeypatch):
    """Device 0 becomes a card: NVIDIA's of a capability or AMD's of a name."""

    def become(kind: tuple[int, int] | str) -> None:
        amd = isinstance(kind, str)
        properties = SimpleNamespace(gcnArchName=f"{kind}:sramecc+:xnack-")
        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4) if amd else kind)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        forget()

    def forget() -> None:
        for function in (cards.card, cards._too_old, cards._warn):
            function.cache_clear()

    yield become
    monkeypatch.undo()
    forget()


class OnCard:
    """As much of a tensor as a choice asks for."""

    is_cuda, device, requires_grad = True, torch.device("cuda", 0), False

    def __init__(self, dtype: torch.dtype, H: int = 64):
        self.dtype, self.shape = dtype, (777, 32, H)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return 0

    def stride(self, *dim: int):
        return 64 if dim else (64, 64, 1)

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize(
    ("kind", "name", "kilobytes", "descriptors"),
    [
        ((7, 5), "sm_75", 64, False),
        ((8, 0), "sm_80", 163, False),
        ((8, 6), "sm_86", 99, False),
        ((8, 9), "sm_89", 99, False),
        ((9, 0), "sm_90", 227, True),
        ((10, 0), "sm_100", 227, True),
        ((12, 0), "sm_120", 99, False),
        ((13, 7), "sm_137", 64, False),  # nobody has it yet
        ((8, 7), "sm_87", 64, False),
        ("gfx90a", "gfx90a", 64, False),
        ("gfx942", "gfx942", 64, False),
        ("gfx1100", "gfx1100", 64, False),
        ("gfx9999", "gfx9999", 64, False),
    ],
)
def test_what_a_card_has(on, kind, name, kilobytes, descriptors):
    """An MI300 says that its capability is (9, 4), and gets no descriptors for it."""
    on(kind)
    card, x = cards.card(0), OnCard(torch.float16)
    assert (card.name, card.shared, card.tma) == (name, kilobytes * 1024, descriptors)
    assert linear_triton.can_use_tma(x) == descriptors
    assert attention_triton.supports_tma(x) == (name == "sm_90")


@pytest.mark.parametrize("kind", [(8, 0), (8, 6), (9, 0), (12, 0), (13, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nvidias_cards_take_triton_without_a_word(on, kind, dtype):
    on(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.choose_backend(None, OnCard(dtype)) == "triton"


def test_bfloat16_where_there_is_none(on):
    on((7, 5))
    half, brain = OnCard(torch.float16), OnCard(torch.bfloat16)
    assert ops.choose_backend("triton", half) == "triton"
    with pytest.warns(UserWarning, match=r"torch's own.*sm_75 has no bfloat16; float16") as said:
        assert [ops.choose_backend("auto", half, brain) for _ in range(3)] == ["torch"] * 3
        assert ops.choose_backend("auto", OnCard(torch.uint8), dtype=torch.bfloat16) == "torch"
    assert len(said) == 1
    with pytest.raises(RuntimeError, match=r"backend='triton': sm_75 has no bfloat16"):
        ops.choose_backend("triton", brain)


def test_where_triton_uses_no_tensor_cores_torch_is_taken(on):
    on((7, 5))
    with pytest.warns(UserWarning, match="sm_75 Triton multiplies without the tensor cores.*backend='triton'") as said:
        assert [ops.choose_backend("auto", OnCard(torch.float16)) for _ in range(3)] == ["torch"] * 3
    assert len(said) == 1


@pytest.mark.parametrize(("kind", "there"), [((7, 5), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
@pytest.mark.filterwarnings("ignore:torch's own operators")
def test_8_bit_floats_where_there_are_some(on, kind, there):
    on(kind)
    x = OnCard(torch.float16)
    assert ops.choose_backend("auto", x, dtype=torch.float8_e4m3fn) == ("triton" if there else "torch")
    if not there:
        with pytest.raises(RuntimeError, match="has no 8-bit floats"):
            ops.choose_backend("triton", x, dtype=torch.float8_e4m3fn)


def test_rows_that_are_too_wide_for_a_program_are_torchs(on):
    """Where nothing is asked for; `backend="triton"` is refused by the kernel."""
    on((9, 0))
    x = OnCard(torch.float16, 8192)
    assert [ops.choose_backend("auto", x, widest=n) for n in (8191, 8192, None)] == ["torch", "triton", "triton"]
    assert ops.choose_backend("triton", x, widest=8191) == "triton"


def test_a_card_that_is_too_old(on):
    on((7, 0))
    x = OnCard(torch.float16)
    with pytest.warns(UserWarning, match="sm_70 is older than sm_75"):
        assert ops.choose_backend("auto", x) == "torch"
    with pytest.raises(RuntimeError, match="sm_70 is older than sm_75"):
        ops.choose_backend("triton", x)


@pytest.mark.parametrize("kind", ["gfx90a", "gfx942", "gfx1100", "gfx9999"])
def test_amds_cards_take_triton_when_asked(on, kind):
    on(kind)
    x = OnCard(torch.bfloat16)
    with pytest.warns(UserWarning, match=rf"{kind} \(AMD\).*never run.*backend='triton'") as said:
        assert [ops.choose_backend("auto", x) for _ in range(3)] == ["torch"] * 3
    assert len(said) == 1
    assert ops.choose_backend("triton", x) == "triton"


@pytest.mark.filterwarnings("ignore:torch's own operators")
@pytest.mark.parametrize("kind", [(7, 5), (9, 0), "gfx942"])
def test_the_choice_is_a_constant_to_the_compiler(on, kind):
    """No graph break; without a card, so with numbers for tensors."""
    on(kind)
    torch.compiler.reset()

    def choose(x):
        return x + 1 if cards.takes_triton(0, True) and not cards.refusal(0, True, False) else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0 if kind == (9, 0) else -1.0] * 2


@pytest.mark.parametrize("H", HEAD_DIMS)
def test_tiles_without_tensor_cores(on, H):
    on((7, 5))
    x, card = OnCard(torch.float16, H), cards.card(0)
    assert attention_triton.tile_for(x, x, x, 777, 777, True) == attention_triton.NO_TENSOR_CORES_TILE
    assert attention_backward_triton.choose_backward_tile("dkv", H, x.dtype, card).BM == 16
    assert linear_triton.settings("quick_gelu", x.dtype, False, card).BM == 64


class Matrix(OnCard):
    """One whose first row begins at an address, and its rows so many numbers apart."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, address: int = 1024, apart: int = 64):
        super().__init__(dtype)
        self.data_ptr, self.stride = lambda: address, lambda dim: apart


@pytest.mark.parametrize(
    "kind, taken", [((9, 0), True), ((10, 0), True), ((8, 0), False), ((12, 0), False), ("gfx942", False)]
)
def test_products_take_descriptors_where_the_card_has_them(on, kind, taken):
    on(kind)
    x = Matrix()
    assert linear_triton.can_use_tma(x, x, x) == taken
    assert linear_triton._bias_first(x) == (kind != (10, 0))


@pytest.mark.parametrize(
    "other",
    [Matrix(address=1032), Matrix(apart=60), Matrix(apart=0), Matrix(apart=-64)],
    ids=["address", "60", "0", "-64"],
)
def test_descriptors_of_products_want_rows_on_multiples_of_16_bytes(on, other):
    """The driver refuses others; a product then takes pointers."""
    on((9, 0))
    x = Matrix()
    assert not any(linear_triton.can_use_tma(*matrices) for matrices in ((other, x, x), (x, other, x), (x, x, other)))
    assert not linear_triton.can_use_tma(*[Matrix(torch.float32)] * 3)


@pytest.mark.parametrize("kind", ["gfx942", (12, 1), (9, 0)])
@pytest.mark.parametrize("H", [8, 100, 256])
def test_head_dims_without_a_tile_are_refused_everywhere(on, kind, H, monkeypatch):
    on(kind)
    x = torch.zeros(5, 2, H, dtype=torch.float16)
    monkeypatch.setattr(cards, "card_of", lambda x: cards.card(0))
    with pytest.raises(ValueError, match=f"head dim {H}: must be 16, 32"):
        attention_triton.attention(x, x, x, torch.tensor([0, 5]).int(), 5, True, None, None, None)


@pytest.mark.parametrize("kind", ["gfx942", (13, 7)])
@pytest.mark.parametrize("H", HEAD_DIMS)
def test_small_cards_get_small_tiles(on, kind, H):
    on(kind)
    small = {t for rows in attention_triton.SMALL_TILES.values() for t in rows.values()}
    x = OnCard(torch.float16, H)
    for queries, keys in [(1, 1), (30, 30), (40, 40), (1, 3000), (777, 777), (3000, 3000)]:
        tile = attention_triton.tile_for(x, x, x, queries, keys, True)
        assert tile in small and not tile.tma
    assert attention_backward_triton.choose_backward_tile("dq", H, x.dtype, cards.card(0)).BM <= 32
