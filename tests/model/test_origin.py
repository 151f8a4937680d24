"""Names and licences of sources, from their directories."""

from pathlib import Path

import pytest

from ptq.model.origin import hub_name, licence


def test_a_directory_of_the_hubs_cache_has_a_name_and_a_commit() -> None:
    cache = Path("/cache/hub/models--org--a-model--x/snapshots/0123abcd")
    assert hub_name(cache) == ("org/a-model--x", "0123abcd")
    assert hub_name(Path("/cache/hub/models--gpt2/snapshots/1")) == ("gpt2", "1")
    for other in ("/models/org/a-model", "snapshots/1", "/x/datasets--a--b/snapshots/1", "a"):
        assert hub_name(Path(other)) is None


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", {"license": "apache-2.0"}),
        (
            '---\nlicense: other\nlicense_name: "llama3.1"\nlicense_link: LICENSE\n---\n',
            {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"},
        ),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# no front matter\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n- other\n---\n", {}),
        ("---\n  license: mit\n---\n", {}),
    ],
)
def test_a_licence_is_what_the_card_says(tmp_path: Path, card: str, said: dict) -> None:
    (tmp_path / "README.md").write_text(card, newline="")
    assert licence(tmp_path) == said


def test_no_card_no_licence(tmp_path: Path) -> None:
    assert licence(tmp_path) == {}
