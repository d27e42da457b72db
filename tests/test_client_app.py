"""Short questions to a site are answered without the packages that take seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

from fedseg.config import StudyConfig
from fedseg.data.planning import make_plan

ANSWER = """
import json, sys

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from fedseg.client_app import app
from fedseg.config import StudyConfig
from fedseg.messages import CONFIG, Task, protocol_record, query_content
from fedseg.federation.secure_site import terms_of
from fedseg.privacy.secagg_server import begin_message

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
run_config = {"privacy.secure-aggregation": True, "federation.guard": False}
study = StudyConfig.from_run_config(run_config)
task = Task(
    study_run="run", config_digest=study.digest(), plan=sys.argv[2], round_number=1, rounds=2
).to_record()
keys = protocol_record(begin_message(terms_of(study, "run", 1, "train")))
asked = {
    "hello": query_content(study), "secagg_keys": RecordDict({CONFIG: task, "secagg": keys})
}
node = json.loads(sys.argv[1])
for action, content in asked.items():
    message = Message(content, dst_node_id=1, message_type=f"query.{action}")
    message.metadata.__dict__["_message_id"] = action
    context = Context(1, 1, node, RecordDict(), run_config)
    answer = app(message, context).content
    assert not {"torch", "monai", "scipy", "nibabel"} & set(sys.modules), action
    print(answer["site"]["name"] if "site" in answer else len(answer["secagg"]["data"]) > 50)
"""


def test_hello_and_keys(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.nii.gz").touch()
    node = {"data-dir": str(tmp_path), "name": "bonn", "cache-dir": str(tmp_path / "cache")}
    plan = make_plan(StudyConfig.from_run_config({}))
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, json.dumps(node), plan.to_json()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bonn", "True"]
