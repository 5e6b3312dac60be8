"""`hellm serve RUN`: a finished run behind HTTP, in one process, with what comes while it serves kept on disk.

A request goes this way, and each step is a module:

    server     uvicorn, signals, what is printed
    app        `create_app`: the FastAPI application, put together from what follows
    guard      what is refused before anything is read: keys, hosts, sizes, slow clients; logs and counts of requests
    routes     one function an endpoint: a pydantic model in (`schema`), plain JSON out
    service    `Service.read(question)` and `Service.write(entry)`: the only way to what is served
    batcher    a bounded queue in front of one thread, which takes what has come together
    answers    questions to a snapshot as plain values; what is wrong with one, by field and with the nearest ids
    state      `Snapshot`: a recommender that nobody changes, and whose it is. A write puts another in its place
    encoding   titles and pictures of new items as the features that the run was trained on
    store      SQLite: events and items, on disk before they are answered and taken up again at the next start

A reader takes the snapshot that is there and keeps it: no lock, and no answer of two states. Writers follow one another
in one thread; each makes a new snapshot, has it on disk, and then swaps it.
"""

from __future__ import annotations
