"""The page of a server: HTML made here, readable without scripts, with nothing from elsewhere.

    rendering   templates, escaped throughout; what every page is given; errors as pages
    sign_in     a form for the API key, and the cookie that stands for it
    shop        what a shop owner asks, which is put to the service by
    questions   the questions of the API, put together, each answered on one snapshot
    surveys     what a sample of customers is shown, within a number and a time
    catalogue   the data set, where one is named: pictures, what is said of items, what deserves a look
    pictures    pictures by the id of an item, small, and drawings where there are none
    reasons     in words
    research    what a researcher asks, which is put to the service by
    studies     hyperedges and the run without one, two runs beside each other, items in a plane; what is kept of them
    charts      lines, intervals and counts as SVG
    search      items and users that are looked for

Every page works by plain links and forms. Where scripts run, htmx (`static/htmx.min.js`, Zero-Clause BSD) puts a part
of the next page into this one instead of loading all of it: a link or form with `hx-get`, `hx-target` and `hx-select`.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from hellm.serve.page import research, shop, sign_in
from hellm.serve.page.catalogue import Catalogue
from hellm.serve.page.pictures import Pictures
from hellm.serve.page.studies import Studies
from hellm.serve.page.surveys import Surveys

__all__ = ["add_page"]

_STATIC = Path(__file__).parent / "static"


def add_page(app: FastAPI, catalogue: Catalogue | None = None) -> None:
    """Serve the pages under `/` and what they load under `/static`; `catalogue` is of the data of the run."""
    service = app.state.service
    app.state.research = Studies(service)
    app.state.shop = shop.Shop(catalogue, Pictures(catalogue, service.store), Surveys(service))
    for router in (sign_in.router, shop.router, research.router):
        app.include_router(router, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")
