"""docs/images/lora_graph.svg is what the block on the page draws now."""
from test_docs import GRADIENTS, ROOT, run_page, sandbox  # noqa: F401  (a fixture)

STORED = ROOT / "docs" / "images" / "lora_graph.svg"


def test_the_picture_is_what_the_page_draws(sandbox, tmp_path):  # noqa: F811
    run_page(GRADIENTS.read_text(encoding="utf-8"), GRADIENTS.name, sandbox)
    made = (tmp_path / STORED.name).read_text(encoding="utf-8")
    assert made == sandbox["picture"].svg()
    assert STORED.read_text(encoding="utf-8") == made, (
        f"{STORED} is not what {GRADIENTS} draws now: run the blocks of section 8 there, and copy {STORED.name} to docs/images")
