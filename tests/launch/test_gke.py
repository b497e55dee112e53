"""The JobSet of launch/gke.sh is one that Kubernetes knows, and means what was asked for."""

import pytest
import yaml
from support.launchers import GKE, dry_run, launch, put

from vadapter.errors import NON_FINITE, USER_ERROR

# Every key that is used, and of what type: those of JobSet's v1alpha2 and Kubernetes' batch/v1 and
# v1. A list has items of one kind. https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2
CONTAINER = {
    "name": str, "image": str, "args": [str], "env": [{"name": str, "value": str}],
    "ports": [{"containerPort": int}],
    "securityContext": {"privileged": bool, "runAsUser": int},
    "resources": {"requests": {"google.com/tpu": int}, "limits": {"google.com/tpu": int}},
}  # fmt: skip
POD = {
    "restartPolicy": str, "serviceAccountName": str, "hostNetwork": bool, "dnsPolicy": str,
    "terminationGracePeriodSeconds": int, "containers": [CONTAINER],
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str,
    },
}  # fmt: skip
CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": CODES}]},
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {
        "name": str, "namespace": str,
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": str,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip
ARGS = ("train", '--config=a"b\\c&d.py', "--workdir=gs://bucket/a run", "--config.x=@name@ # {}")
ODD = 'a "b"\\c & d=e: # {}'


def misfits(value, schema, where="jobset"):
    """Where a parsed document is not of these keys and types."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            return [f"{where}: {value}"]
        return [m for key in schema for m in misfits(value[key], schema[key], f"{where}.{key}")]
    if isinstance(schema, list):
        items = value if isinstance(value, list) else [None]
        return [m for i, item in enumerate(items) for m in misfits(item, schema[0], f"{where}.{i}")]
    return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def jobset():
    done = dry_run("gke.sh", *GKE, "--slices=4", f"--env=ON={ODD}", "--env=B=", "--", *ARGS)
    return yaml.safe_load(done.stdout)


def test_keys_and_types_are_those_of_kubernetes(jobset):
    assert not misfits(jobset, JOBSET)
    assert misfits({**jobset, "spec": {}}, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_a_job_is_a_slice_with_a_pod_for_each_of_its_machines(jobset):
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (4, 16, 16)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    chips = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": chips, "limits": chips}


def test_the_command_and_its_variables_come_through_yaml_unchanged(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == [*ARGS, "--config.mesh.slices=4"]
    variables = {"VADAPTER_DISTRIBUTED": "auto", "ON": ODD, "B": ""}
    assert container["env"] == [{"name": k, "value": v} for k, v in variables.items()]


def test_exit_codes_that_restarting_cannot_help_end_it_and_all_others_restart_it(jobset):
    policy = jobset["spec"]["failurePolicy"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, NON_FINITE, USER_ERROR]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["containerName"] == "vadapter"
    (final,) = policy["rules"]  # what no rule is about restarts the JobSet
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] == 20
    # Kubernetes takes a podFailurePolicy with no other restartPolicy.
    assert (job["template"]["spec"]["restartPolicy"], job["backoffLimit"]) == ("Never", 0)


def test_it_goes_to_the_cluster_that_is_named(tmp_path):
    kubectl = 'echo "$*" >"$SAID/asked"; cat >"$SAID/yaml"'
    path = put(tmp_path / "bin", kubectl=kubectl)
    done = launch("gke.sh", *GKE, "--", *ARGS, PATH=path, SAID=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "asked").read_text() == "--context=gke_p-1_us-west4_c apply -f -\n"
    dry = dry_run("gke.sh", *GKE, "--", *ARGS).stdout
    assert dry.startswith((tmp_path / "yaml").read_text() + "# to: kubectl --context=gke_p-1_")
