"""mlx-lm's releases under the cache contracts: a made-up release always, real ones where they are unpacked.

MLX_LM_RELEASES names a folder of unpacked wheels, each in a folder called by its version.
"""

import os
from pathlib import Path

import pytest

from audits import releases

BASES = Path(__file__).parents[1] / "mutants"
# By version, the checks that fail; docs/evidence/mlx-lm-caches.md says why.
EXPECTED = {
    ("0.22.0", "kv_cache"): set(),
    ("0.22.0", "rotating_kv_cache"): {"outside window"},
    ("0.28.0", "kv_cache"): {"outside window"},
    ("0.28.0", "rotating_kv_cache"): {"mask shape"},
    ("0.30.0", "kv_cache"): {"outside window"},
    ("0.30.0", "rotating_kv_cache"): set(),
    ("0.31.0", "kv_cache"): set(),
    ("0.32.2", "kv_cache"): set(),
    ("0.32.2", "rotating_kv_cache"): set(),
    ("0.32.2", "chunked_kv_cache"): set(),
    ("0.32.2", "quantized_kv_cache"): set(),
    ("0.32.2", "batch_kv_cache"): {"growth in graph nodes", "size"},
    ("0.32.2", "batch_rotating_kv_cache"): {"lost token"},
}


@pytest.mark.parametrize(("version", "contract"), EXPECTED)
def test_fails_where_it_is_known_to(version: str, contract: str) -> None:
    folder = Path(os.environ.get("MLX_LM_RELEASES", "/nonexistent")) / version
    if not folder.is_dir():
        pytest.skip(f"mlx-lm {version} isn't unpacked in MLX_LM_RELEASES")
    (judged,) = releases.judge(folder, (contract,), shrinking=False)
    assert set(judged.failed) == EXPECTED[version, contract]


def made_up(folder: Path, cache: str) -> Path:
    models = folder / "mlx_lm" / "models"
    models.mkdir(parents=True)
    (models / "cache.py").write_text(cache)
    (models / "base.py").write_text(
        "import mlx.core as mx\n\n\ndef create_attention_mask(h, cache):\n"
        "    n, offset = h.shape[1], cache[0].offset\n"
        "    return mx.arange(offset + n) <= mx.arange(offset, offset + n)[:, None]\n"
    )
    return folder


def test_a_release_is_judged_and_leaves_no_module_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (BASES / "kv_cache" / "mlx_buffer.py").read_text()
    good = made_up(tmp_path / "1.0", text)
    bad = made_up(tmp_path / "1.1", text.replace("if n == 1 and window_size is None:", "if n == 1:"))
    assert releases.main([str(good)]) == 0
    assert releases.main([str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "1.0              kv_cache                 pass" in out
    assert "FAIL" in out and "outside window" in out


def test_a_release_without_make_mask_is_asked_by_its_base_module(tmp_path: Path) -> None:
    text = (BASES / "kv_cache" / "mlx_buffer.py").read_text()
    start, end = text.index("    def make_mask"), text.index("    def is_trimmable")
    folder = made_up(tmp_path / "0.1", text[:start] + text[end:])
    (judged,) = releases.judge(folder, ("kv_cache",))
    assert not judged.failed and judged.passed > 50
    assert any("window_size" in message for message in judged.skipped)


def test_another_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert releases.main([str(tmp_path)]) == 2
    assert "give the folder of an unpacked mlx-lm wheel" in capsys.readouterr().out
    assert releases.main([]) == 2
