"""The choice of tiles: pure Python, for every architecture, on any machine."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ptq.bench import tune
from ptq.kernels import dispatch
from ptq.kernels.dispatch import BUCKETS, Table, Tile

ARCHITECTURES = (80, 90, 100, 120)


def test_importing_it_needs_no_triton_and_asks_no_device() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.cuda.get_device_capability = torch.cuda.get_device_properties = None\n"
        "from ptq.kernels import dispatch\n"
        "assert dispatch.choose(90, 'w4a16', 'nvfp4', 1, 4096, 4096).kernel == 'w4a16'\n"
        "assert not dispatch.available('cpu') and not dispatch.multiplies_fp4('cpu')\n"
        "assert not [m for m in sys.modules if m.startswith('triton') and sys.modules[m] is not "
        "None]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_cpu_is_never_available() -> None:
    """Not even with an interpreter: layers on the CPU take the reference path."""
    assert not dispatch.available("cpu") and not dispatch.available(torch.device("meta"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_survive_json_and_serve_every_bucket(arch: int) -> None:
    table = dispatch.table(arch)
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    for fmt in dispatch.FORMATS.values():
        for operation in ("w4a16", "grouped"):
            for tokens in (*BUCKETS, 3, 100, 100_000):
                tile = dispatch.choose(arch, operation, fmt, tokens, 4096, 14336)
                assert operation == "w4a16" or tile.kernel == "w4a16", "experts have no dense path"
    for fmt in ("nvfp4", "mxfp4") if arch >= 100 else ():
        assert all(
            dispatch.choose(arch, "w4a4", fmt, tokens, 4096, 14336).kernel == "w4a4"
            for tokens in BUCKETS
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("n", "k"),
    [(6144, 4096), (4096, 14336), (57344, 8192), (8192, 28672), (1024, 1536), (4096, 4128)],
)
def test_splits_fill_the_device_and_leave_work_for_each(arch: int, n: int, k: int) -> None:
    for tokens in (1, 16, 64):
        tile = dispatch.choose(arch, "w4a16", "nvfp4", tokens, n, k)
        assert tile.split <= 16 and (tile.split == 1 or k % (tile.split * tile.block_k) == 0)
        assert tile.split == 1 or k // (tile.split * tile.block_k) >= 4
        programs = -(-n // tile.block_n) * -(-tokens // tile.block_m) * tile.split
        grows = (
            k % (2 * tile.split * tile.block_k) == 0
            and k // (2 * tile.split * tile.block_k) >= 4
            and tile.split < 16
        )
        assert programs >= 2 * dispatch.MULTIPROCESSORS[arch] or not grows


def test_a_shape_without_a_row_takes_the_nearest_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    near, far = Tile(kernel="w4a16", block_n=64), Tile(kernel="w4a16", block_n=128)
    rows = tuple(
        dispatch.Row(operation="w4a16", format="nvfp4", tokens=16, n=n, k=4096, tile=t)
        for n, t in ((5000, near), (90000, far))
    )
    monkeypatch.setattr(
        dispatch, "table", lambda arch: Table(architecture=arch, source="", triton="", rows=rows)
    )
    dispatch.choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="ptq.kernels.dispatch"):
        for tokens in (9, 13, 16):
            assert (
                replace(dispatch.choose(91, "w4a16", "nvfp4", tokens, 6000, 4096, 132), split=1)
                == near
            )
    assert [record.message for record in caplog.records] == [
        "no tile for w4a16 nvfp4 6000×4096 on sm_91: using that of 5000×4096"
    ]
    with pytest.raises(ValueError, match="ptq bench --tune"):
        dispatch.choose(91, "w4a16", "nvfp4", 64, 6000, 4096)
    dispatch.choose.cache_clear()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_that_were_not_timed_are_the_rules_of_thumb(arch: int) -> None:
    """A change of the rules has to be written: ptq bench --untimed; timed rows are free to
    differ."""
    shipped = [row for row in dispatch.table(arch).rows if not row.microseconds]
    assert set(shipped) <= set(tune.untimed(arch).rows)
    for operation in ("w4a16", "w4a4") if arch >= 100 else ("w4a16",):
        tiles = list(tune.candidates(arch, operation, "nvfp4", 16, 4096, 14336))
        assert len(tiles) > 8 and all(14336 % (tile.split * tile.block_k) == 0 for tile in tiles)


def test_obstacles_are_named() -> None:
    fine = ("e2m1", "e4m3", 16, 4096)
    assert dispatch.obstacle(*fine, rotation=128) is None
    assert "no kernel for int8" in str(dispatch.obstacle("int8", "e8m0", 32, 4096))
    assert "rotation of 256" in str(dispatch.obstacle(*fine, rotation=256))
    assert "groups of 16" in str(dispatch.obstacle("e2m1", "e4m3", 16, 40))
    assert "float32" in str(dispatch.obstacle(*fine, dtype=torch.float32))
    assert "bfloat16" in str(dispatch.obstacle("e2m1", "e8m0", 32, 64, dtype=torch.float16))
    high = torch.tensor([[130, 137]], dtype=torch.uint8)
    assert "136" in str(dispatch.obstacle("e2m1", "e8m0", 32, 64, scale_bits=high))
    assert dispatch.obstacle("e2m1", "e8m0", 32, 64, scale_bits=high.clamp(max=136)) is None


def test_a_table_with_unknown_keys_is_refused() -> None:
    row = {
        "operation": "w4a16",
        "format": "nvfp4",
        "tokens": 1,
        "n": 1,
        "k": 1,
        "kernel": "w4a16",
        "blok_m": 3,
    }
    with pytest.raises(ValueError, match="blok_m"):
        Table.from_dict({"architecture": 90, "source": "", "triton": "", "rows": [row]})


def test_every_shape_has_a_tile_to_time() -> None:
    """640 is no multiple of the 256 columns that a W4A4 tile takes at a time."""
    assert all(tile.split == 1 for tile in tune.candidates(120, "w4a4", "nvfp4", 1, 256, 640))
    assert list(tune.candidates(120, "w4a4", "nvfp4", 1, 256, 640))
