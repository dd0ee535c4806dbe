"""Checks MPIJob manifests: their own fields by those of kubeflow.org/v2beta1, their pods by the schema of Kubernetes."""

import sys

import kubernetes_validate
import yaml

# Fields of pkg/apis/kubeflow/v2beta1/types.go of kubeflow/mpi-operator, with what they hold.
SPEC = {
    "slotsPerWorker": int,
    "runPolicy": dict,
    "mpiReplicaSpecs": dict,
    "sshAuthMountPath": str,
    "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
    "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
}
RUN_POLICY = {
    "cleanPodPolicy": {"All", "Running", "None"},
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "schedulingPolicy": dict,
    "suspend": bool,
}
REPLICA = {
    "replicas": int,
    "template": dict,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
}


def check(where, value, fields):
    for name, held in value.items():
        if name not in fields:
            sys.exit(f"{where}.{name}: no such field; there are {', '.join(fields)}")
        wanted = fields[name]
        good = held in wanted if isinstance(wanted, set) else type(held) is wanted
        if not good:
            sys.exit(f"{where}.{name}: {held!r} is not {wanted}")


for path in sys.argv[1:]:
    with open(path) as file:
        job = yaml.safe_load(file)
    if (job["apiVersion"], job["kind"]) != ("kubeflow.org/v2beta1", "MPIJob"):
        sys.exit(f"{path}: {job['apiVersion']} {job['kind']} is not kubeflow.org/v2beta1 MPIJob")
    spec = job["spec"]
    check("spec", spec, SPEC)
    check("spec.runPolicy", spec["runPolicy"], RUN_POLICY)
    replicas = spec["mpiReplicaSpecs"]
    if set(replicas) != {"Launcher", "Worker"}:
        sys.exit(f"{path}: replicas {set(replicas)} are not Launcher and Worker")
    for name, replica in replicas.items():
        check(f"spec.mpiReplicaSpecs.{name}", replica, REPLICA)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}, **replica["template"]}
        kubernetes_validate.validate(pod, "1.37", strict=True)
    print(f"cluster: {path} passed")
