"""The ClientApp: translate a message, call the library, answer. Nothing else leaves a site."""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedseg.config import StudyConfig
from fedseg.data.node import open_site
from fedseg.federation.egress import Reply, answered
from fedseg.federation.secure_site import SECURE_STEPS
from fedseg.greeting import Greeting, greeting_message

__all__ = ["app"]

# Before torch is imported: waiting OpenMP threads that spin stall a step for seconds when other
# work shares the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = ClientApp()


@app.query("hello")
@answered
def hello(message: Message, context: Context, study: StudyConfig) -> Message:
    """Say who this site is; phantoms aren't made yet, so that a study starts at once."""
    site = open_site(context.node_config, study, make_phantoms=False)
    greeting = Greeting(name=site.name, simulated=site.simulated, sites=site.sites)
    return greeting_message(message, greeting)


for _action, _step in SECURE_STEPS.items():
    app.query(_action)(answered(_step))


# A real site's process lives for one message; what trains, scores or reads scans takes seconds to
# import, so it is imported by the messages that need it.


@app.query("fingerprint")
@answered
def fingerprint(message: Message, context: Context, study: StudyConfig) -> Message:
    """Answer with the histograms that the site's policy lets leave."""
    from fedseg import site_work

    return site_work.fingerprint(message, context, study)


@app.train()
@answered
def train(message: Message, context: Context, study: StudyConfig) -> Reply:
    """Train the global model on the site's cases and answer with the change."""
    from fedseg import site_work

    return site_work.train(message, context, study)


@app.evaluate()
@answered
def evaluate(message: Message, context: Context, study: StudyConfig) -> Message | Reply:
    """Score the global model on the site's held-out cases and answer with sums and counts."""
    from fedseg import site_work

    return site_work.evaluate(message, context, study)
