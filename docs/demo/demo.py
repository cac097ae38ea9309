"""The demo of the whole: from the Go original to this project and back, and what happens to those who work meanwhile.

``make e2e-demo`` runs it; docs/demo/README.md says what is real in it and what is played. What it claims (✓) was seen in this
run, or it ends with status 1. The clusters, and the programs that measure, are in tests/e2e.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import textwrap
import time
from collections import Counter
from typing import Final

from cryptography import x509
from e2e import source
from e2e.load import Download, Gets, Watch, gap
from e2e.stage import ClaimError, Stage
from e2e.workloads import LISTED
from e2e.world import AGENTS, CLUSTERS, NAMESPACE, rolled_out
from kube.addon_installation import OF_TUNNEL
from kube.klusterlet import secret_data

from clusterproxy.addon.certificates import issued_by

MIB: Final = 2**20
#: How long the client sleeps. Whoever had to wait for it would wait for so long, or until it is thrown out (10 s).
SLEEP_S: Final = 20.0
#: So nobody waited for it who took less than this; it is some ten times what a dial takes while nothing happens.
FLICKER_S: Final = 2.0

FORWARD = """clusterproxy http-proxy --listen 3128 --server proxy-entrypoint.$NS.svc:8090 \\
  --ca-cert ca.crt --cert tls.crt --key tls.key"""
LIST = """curl -sSk -x http://127.0.0.1:3128 -H "Authorization: Bearer $TOKEN_1" --limit-rate 4M -o archive.json \\
  https://cluster1/api/v1/namespaces/archive/configmaps"""
SERVICE = "https://$USER_SERVER/cluster1/api/v1/namespaces/default/services/http:source:9000/proxy-service"
PODS = "kubectl -n $NS get pods -l proxy.open-cluster-management.io/component-name=proxy-server"
#: What a proxy server begins with says whose it is.
WHOSE = "kubectl -n $NS exec deployment/cluster-proxy -- head -c 4 /proxy-server | od -An -c"


def the_original(stage: Stage) -> None:
    stage.chapter("The Go original on a hub with two clusters")
    stage.run("helm install -n $NS --create-namespace cluster-proxy ./original")
    stage.original.first_steps()
    stage.until(lambda: stage.original.servers_are("the Go original's"), "its servers are there")
    stage.until(lambda: stage.original.agents_are("the Go original's"), "its agents are there")
    stage.world.await_available()
    stage.run("kubectl get managedclusteraddon -A | grep cluster-proxy")
    said = stage.run(WHOSE)
    stage.holds("the proxy server is a compiled program, Go's", "E   L   F" in said)
    stage.tell("""From now on the apiservers of both clusters are dialled in turn, ten times a second until the end of this demo, each
        time by a new connection to port 8090 of proxy-entrypoint, with a request for /healthz over TLS.""")
    stage.dial()
    stage.until(lambda: stage.dials.all_succeed(3), "dials succeed")
    stage.none_failed(stage.dials.of(*stage.while_it_goes_on(5)), "dials")


def a_client_that_sleeps(stage: Stage, *others: Gets | Watch) -> tuple[float, float]:
    """Have a client of cluster1 stop in the middle of an answer, and say what came of all others before and meanwhile."""
    before = stage.while_it_goes_on(15)
    stage.type(f"{FORWARD} &")
    stage.type(LIST + " &")
    with Download(stage.world, "http-proxy", FORWARD) as proxy:
        proxy.await_said("HTTP proxy")
        with Download(stage.world, "archive.json", LIST) as client:
            client.await_size(4 * MIB)
            client.stop()
            stage.type("kill -STOP $!    # it reads no more, and does not hang up")
            size = client.size
            meanwhile = stage.while_it_goes_on(SLEEP_S)
            stage.holds(
                f"the client has {size // MIB} MiB of 55, and no more after {SLEEP_S:.0f} s",
                client.size == size,
            )
            stage.type("kill -CONT $!")
            client.go_on()
            for name, (begin, end) in (("before", before), ("meanwhile", meanwhile)):
                for cluster in CLUSTERS:
                    stage.saw(f"{name:9} dials of {cluster}", stage.dials.of(begin, end, cluster))
                for each in others:
                    stage.saw(f"{name:9} {each.what}", each.of(begin, end))
            status, said = client.end(60)
            stage.saw("the client ends with", f"status {status} {said}".strip())
            if status:
                stage.saw("and its http-proxy said", proxy.said.splitlines()[-1])
            if others:
                names = [
                    each["metadata"]["name"]
                    for each in json.loads(client.file.read_text())["items"]
                ]
                found = len([each for each in names if each.startswith("volume-")])
                stage.holds(f"it has got all {found} of what it asked for, late", found == LISTED)
    return meanwhile


def stopped_at_the_original(stage: Stage) -> None:
    stage.chapter("What a client that stops reading does to others at the original")
    stage.tell("""Somebody lists 55 MiB of ConfigMaps in cluster1 through the tunnel, and suspends curl in the middle. All that comes
        from a cluster's agent comes by one stream, which waits for that client, until our http-proxy gives it up after ten seconds.""")
    begin, end = a_client_that_sleeps(stage)
    stage.until(lambda: stage.dials.all_succeed(3), "dials succeed again")
    near, far = (stage.dials.of(begin, end, each) for each in CLUSTERS)
    stage.holds(
        f"dials of cluster1 failed or waited for somebody else's client: {len(near.failed)} failed, the slowest took {near.slowest_s:.1f} s",
        near.failed or near.slowest_s > FLICKER_S,
    )
    stage.none_failed(far, "dials of cluster2, which has an agent of its own")


def to_ours(stage: Stage) -> None:
    stage.chapter("From the original to ours, by docs/migration.md")
    requests, signer = stage.original.requests(), stage.world.secret("cluster-proxy-signer")
    begin = time.monotonic()
    stage.step("what is there")
    stage.run("""cat > values.yaml <<END
registry: registry.example/team
proxyServer:
  entrypointAddress: proxy.hub.example
END""")
    stage.run("helm repo add ocm $CHARTS")
    for step in (
        "stop the manager",
        "let the old servers go",
        "upgrade the hub",
        "end the old servers",
    ):
        stage.step(step)
    stage.until(lambda: stage.original.servers_are("ours"), "the servers are ours")
    stage.saw("dials so far, old agents at new servers", stage.dials.of(begin, time.monotonic()))
    stage.step("upgrade the agents")
    stage.until(lambda: stage.original.agents_are("ours"), "the agents are ours")
    stage.step("clean up")
    stage.until(
        lambda: stage.original.servers_are("ours"), "the servers have their usual arguments"
    )
    stage.world.await_available()
    dials = stage.dials.of(begin, time.monotonic())
    stage.saw("dials since the original's manager was stopped", dials)
    stage.none_failed(dials, "dials on the way from the original to ours")
    said = stage.run(WHOSE)
    stage.holds("the proxy server is a Python program now", "#   !" in said)
    stage.holds("no agent has asked for a new certificate", stage.original.requests() == requests)
    stage.holds(
        "the authority is the same, byte for byte",
        stage.world.secret("cluster-proxy-signer") == signer,
    )


def kubectl_through_the_hub(stage: Stage) -> None:
    stage.chapter("kubectl and services of the clusters, by docs/install.md and docs/kubectl.md")
    stage.tell("""The user server and the service proxies are switched on, and the proxy servers are told to let open connections go on for
        two minutes when they end, instead of 25 s: longer than the copy below takes.""")
    begin = time.monotonic()
    stage.run("""helm upgrade -n $NS cluster-proxy ocm/cluster-proxy --reset-then-reuse-values \\
  --set enableServiceProxy=true --set userServer.enabled=true \\
  --set exposedServices[0].namespace=default --set exposedServices[0].service=source \\
  --set 'proxyServer.additionalArgs={--graceful-shutdown-timeout=120s}'""")
    for name in ("cluster-proxy-addon-user", "cluster-proxy"):
        stage.run(f"kubectl -n $NS rollout status deployment/{name} --timeout=180s")
    stage.until(
        lambda: all(has_service_proxy(stage, each) for each in CLUSTERS),
        "the agents have service proxies",
    )
    stage.until(lambda: has_grace(stage), "the servers have the argument")
    stage.world.await_available()
    for number, name in enumerate(CLUSTERS, 1):
        stage.run(f"""kubectl config set-cluster {name} --server=https://$USER_SERVER/{name} --certificate-authority=ca.crt
kubectl config set-credentials {name} --token=$TOKEN_{number}
kubectl config set-context {name} --cluster={name} --user={name} --namespace=default""")
        stage.run(f"kubectl --context {name} get pods")
    stage.none_failed(stage.dials.of(begin, time.monotonic()), "dials meanwhile")


def has_service_proxy(stage: Stage, cluster: str) -> bool:
    """Whether the agents of a cluster have a service proxy beside them, and are ready."""
    agent = stage.world.agent(cluster)
    names = {each["name"] for each in agent["spec"]["template"]["spec"]["containers"]}
    return "service-proxy" in names and rolled_out(agent)


def has_grace(stage: Stage) -> bool:
    """Whether all proxy servers that there are have two minutes to end."""
    deployment = stage.world.hub.plane.get("apps/v1", "Deployment", "cluster-proxy", NAMESPACE)
    return bool(
        deployment
        and rolled_out(deployment)
        and deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 120
    )


def stopped_at_ours(stage: Stage) -> None:
    stage.chapter("One client stops reading, nothing else flickers")
    stage.tell("""Both clusters are asked by kubectl again and again, and watched: somebody makes a ConfigMap, and how long it takes until a
        watch on the hub shows it is measured. First for 15 s as it is, then beside the client from above that sleeps for 20 s.""")
    get, watch = (
        "kubectl --context {cluster} get pods",
        "kubectl --context {cluster} get configmaps --watch --output-watch-events",
    )
    stage.type(
        "while sleep 0.25; do kubectl --context cluster1 get pods; kubectl --context cluster2 get pods; done &"
    )
    with contextlib.ExitStack() as beside:
        others: list[Gets | Watch] = [beside.enter_context(Gets(stage.world, get))]
        for each in CLUSTERS:
            command = watch.format(cluster=each)
            stage.type(f"{command} &")
            others.append(beside.enter_context(Watch(stage.world, each, command)))
        begin, end = a_client_that_sleeps(stage, *others)
        figures = [stage.dials.of(begin, end), *(each.of(begin, end) for each in others)]
    names = ("dials", *(each.what for each in others))
    for name, found in zip(names, figures, strict=True):
        stage.none_failed(found, name)
        stage.holds(
            f"{name}: the slowest took less than {FLICKER_S:.0f} s; who had to wait for the client would have waited {SLEEP_S:.0f} s",
            found.slowest_s < FLICKER_S,
        )


def changed_beneath(stage: Stage) -> None:
    stage.chapter(
        "The authority replaced and the servers rolled, beneath kubectl logs -f and a copy"
    )
    stage.tell("""A pod writes ten numbered lines a second, which somebody follows, and somebody copies a GiB at 10 MiB a second, both through the
        user server. The overlap of the two authorities is twelve seconds here, where every changed secret is mounted at once; it
        is ten minutes where nothing else is said.""")
    world = stage.world
    begin = time.monotonic()
    logs, copy = (
        "kubectl --context cluster1 logs -f talker",
        f"curl -sS --cacert ca.crt --limit-rate 10M -o copy.bin \\\n  {SERVICE}/1GiB",
    )
    stage.type(f"{logs} > lines.txt &\n{copy} &")
    with (
        Download(world, "lines.txt", f"{logs} > lines.txt") as lines,
        Download(world, "copy.bin", copy) as copied,
    ):
        lines.await_size(10)
        copied.await_size(MIB)
        old = world.secret("cluster-proxy-signer")["ca.crt"]
        stage.run("""kubectl -n $NS annotate secret cluster-proxy-signer --overwrite \\
  proxy.open-cluster-management.io/ca-overlap=12s proxy.open-cluster-management.io/rotate-ca="$(date +%s)\"""")
        stage.until(lambda: is_replaced(stage, old), "the old authority is gone")
        stage.saw("the old authority is trusted no more, the copy has", f"{copied.size // MIB} MiB")
        stage.holds(
            "the agents have certificates of the new one",
            all(has_new_certificate(stage, each) for each in CLUSTERS),
        )
        rolled = time.monotonic()
        stage.run("""kubectl -n $NS rollout restart deployment/cluster-proxy
kubectl -n $NS rollout status deployment/cluster-proxy --timeout=180s""")
        stage.run(PODS)
        stage.saw("the servers are rolled, the copy has", f"{copied.size // MIB} MiB")
        stage.holds("the copy has not ended yet, nor the lines", not copied.over and not lines.over)
        stage.until(lambda: copied.over, "the copy is over")
        status, complaint = copied.end(1)
        stage.holds(
            f"the copy has arrived: {copied.size} bytes, without a complaint",
            (status, complaint, copied.size) == (0, "", 1024 * MIB),
        )
        said = stage.run("sha256sum copy.bin")
        stage.holds("that is the sum of what was sent", said.split()[0] == source.digest())
        stage.type("kill -INT %1")
        stage.holds("kubectl logs -f has gone on until here", not lines.over)
        lines.interrupt()
        complaint = lines.end(1)[1]
    numbers = [int(each) for each in re.findall(r"(?m)^line (\d+)$", lines.file.read_text())]
    stage.run("wc -l lines.txt; head -1 lines.txt; tail -1 lines.txt")
    stage.holds(
        "no line is missing, none came twice, and kubectl said nothing",
        numbers == list(range(numbers[0], numbers[0] + len(numbers))) and not complaint,
    )
    stage.until(lambda: one_server(stage), "the old server has ended")
    stage.saw("the old server has ended after", f"{time.monotonic() - rolled:.0f} s")
    dials = stage.dials.of(begin, time.monotonic())
    stage.saw("dials meanwhile, which wait at a new server until the agents are there", dials)
    stage.none_failed(dials, "dials while the authority was replaced and servers were rolled")


def is_replaced(stage: Stage, old: bytes) -> bool:
    """Whether another authority than the old one signs, and nothing else is trusted."""
    signer, bundle = (
        stage.world.secret(each) for each in ("cluster-proxy-signer", "proxy-server-ca")
    )
    return (
        signer["ca.crt"] != old
        and set(signer) == {"ca.crt", "ca.key"}
        and bundle == {"ca.crt": signer["ca.crt"]}
    )


def has_new_certificate(stage: Stage, cluster: str) -> bool:
    """Whether the agents of a cluster have a certificate of the authority that signs now."""
    secret = secret_data(stage.world.managed[cluster].plane, AGENTS, OF_TUNNEL)
    authority = x509.load_pem_x509_certificate(stage.world.secret("cluster-proxy-signer")["ca.crt"])
    if secret is None:
        return False
    return issued_by(x509.load_pem_x509_certificate(secret["tls.crt"]), authority)


def one_server(stage: Stage) -> bool:
    """Whether there is no other pod of a proxy server any more."""
    return len(stage.world.operator.run(f"{PODS} -o name").split()) == 1


def back(stage: Stage) -> None:
    stage.chapter("Back to the original")
    requests = stage.original.requests()
    begin = time.monotonic()
    stage.step("go back")
    stage.original.steps_back()
    stage.until(lambda: stage.original.servers_are("the Go original's"), "the servers are Go's")
    stage.saw(
        "Go's servers are there, and ours have ended, after", f"{time.monotonic() - begin:.0f} s"
    )
    stage.until(lambda: stage.original.agents_are("the Go original's"), "the agents are Go's")
    stage.saw(
        "Go's agents are there, and ours have ended, after", f"{time.monotonic() - begin:.0f} s"
    )
    stage.until(lambda: stage.dials.all_succeed(3), "dials succeed")
    dials = stage.dials.of(begin, time.monotonic())
    stage.saw("dials since helm rollback", dials)
    for reason, count in Counter(why(each.problem) for each in dials.failed).most_common(3):
        stage.saw(f"{count} failed", textwrap.shorten(reason, 90))
    stage.tell(f"""{len(dials.failed)} dials failed, from the first to the last within {gap(dials.failed):.1f} s. That is the original's way: its
        Deployment ends the old servers before it starts new ones (Recreate), and these answer "No agent available" until its
        agents have found them. docs/migration.md says so, too.""")
    said = stage.run(WHOSE)
    stage.holds("the proxy server is Go's again", "E   L   F" in said)
    stage.holds(
        "no agent has asked for a new certificate on the way back",
        stage.original.requests() == requests,
    )
    stage.none_failed(
        stage.dials.of(*stage.while_it_goes_on(10)),
        "dials of both clusters through Go's server and agents",
    )


def why(problem: str) -> str:
    """Return why a dial failed, without where and when."""
    return re.sub(r"^\S+ after [0-9.]+ s: ", "", problem)


def main() -> int:
    with Stage() as stage:
        try:
            for chapter in (
                the_original,
                stopped_at_the_original,
                to_ours,
                kubectl_through_the_hub,
                stopped_at_ours,
                changed_beneath,
                back,
            ):
                chapter(stage)
        except ClaimError as error:
            stage.write(f"\nThis does not hold: {error}")
            return 1
        stage.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
