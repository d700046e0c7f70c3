"""One run in a process of its own, for tests that start several: python -m tests.flows.one_run MANIFEST STORE REJECT [WORKERS]."""

import sys

from flows.nightly import nightly
from flows.parameters import Generation, Policy, Scoring, Workers
from tests.flows.conftest import MODEL, SCORER

if __name__ == "__main__":
    manifest, store, reject, *workers = sys.argv[1:]
    summary = nightly(
        manifest=manifest,
        store=store,
        name="shapes",
        generation=Generation(model=MODEL, candidates=4, shard_size=8, steps=3),
        scoring=Scoring(scorer=SCORER),
        policy=Policy(reject=reject),
        workers=Workers(workers=int(workers[0]) if workers else 0),
    )
    print(summary["run"])
