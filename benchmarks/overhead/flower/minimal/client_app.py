"""Load the weights, train, send the weights back."""

import work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    network = work.build()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    round_number = message.content["config"]["server-round"]
    loss = work.train(network, context.node_config["partition-id"], round_number)
    metrics = MetricRecord({"train_loss": loss, "num-examples": work.STEPS * work.BATCH})
    arrays = ArrayRecord(network.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
