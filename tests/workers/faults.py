"""Jobs that go wrong."""

import sys
import time

from workers import laws


def sleep(strategy):
    """Take longer than anybody waits."""
    sys.stdout.write("it sleeps\n")
    time.sleep(600)


def fail(strategy):
    """Raise an error."""
    raise RuntimeError("as was to be expected")


def read(strategy, name):
    """Read a property of a model in one worker alone."""
    law = laws.LAWS["batches"]
    batches = sum(laws.batches_of(law, strategy.num_replicas_in_sync), [])[:4]
    model = laws.converted(strategy, law)
    laws.FEEDS["loop"](strategy, model, batches, 1)
    return int(getattr(model, name)) if strategy.cluster_resolver.task_id == 0 else None
