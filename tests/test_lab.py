"""`make lab` opens the course."""

import json

from jupyter_lab import TOKEN, fetch, make_lab


def test_make_lab_answers_on_its_page_within_a_minute(tmp_path):
    with make_lab(tmp_path) as address:
        assert b"JupyterLab" in fetch(f"{address}/lab?token={TOKEN}")
        listing = fetch(f"{address}/api/contents/notebooks?token={TOKEN}")
        assert b"01_rank_intuition.ipynb" in listing
        page = fetch(f"{address}/api/contents/notebooks/01_rank_intuition.ipynb?token={TOKEN}")
        cells = [c for c in json.loads(page)["content"]["cells"] if c["cell_type"] == "code"]
        assert all(cell["metadata"]["trusted"] for cell in cells)  # or figures lose their alt text
