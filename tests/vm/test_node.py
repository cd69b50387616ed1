"""cribd as a node's service: hack/crib.service under systemd, in a machine that is thrown away."""

from __future__ import annotations

import subprocess

import pytest

from tests.requires import requires
from tests.vm.conftest import REPO

pytestmark = [requires("root", "vm-newest"), pytest.mark.timeout(600)]

IMAGE = "localhost/crib/busybox:latest"
SCRIPT = f"""
set -eux
sed "s#/opt/crib/#$PWD/#" hack/crib.service >/etc/systemd/system/crib.service
systemd-analyze verify /etc/systemd/system/crib.service
systemctl daemon-reload
systemctl enable --now crib
hack/busybox-image /tmp/busybox.tar
crib load /tmp/busybox.tar
crib run -d --name one {IMAGE} sleep 1000
pid=$(crib inspect one | sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p' | head -n 1)
lives() {{ grep -q sleep /proc/$pid/cmdline; crib ps | grep running; crib exec one true; }}
lives
[ $(cat /proc/$pid/oom_score_adj) = 0 ]

systemctl restart crib
lives
systemctl stop crib
grep -q sleep /proc/$pid/cmdline
systemctl daemon-reload
systemctl start crib
lives

# One that crashes is started again, however often.
for _ in 1 2 3 4 5 6; do
    old=$(systemctl show --value --property MainPID crib)
    systemctl kill --signal KILL --kill-whom main crib
    until [ "$(systemctl show --value --property MainPID crib)" != $old ] && systemctl is-active --quiet crib; do
        systemctl is-failed crib && exit 1
        sleep 0.1
    done
done
lives

crib rm -f one
systemctl disable --now crib
[ -z "$(nft list tables)" ]
[ ! -e /sys/fs/cgroup/crib.slice ]
! ip link show crib0
ls -A /run/crib/pods /run/netns | grep crib- && exit 1
journalctl --unit crib --no-pager --output cat | grep 'level=error' && exit 1
echo 'all well'
"""


def test_pods_live_on_whatever_becomes_of_the_service(vm: str) -> None:
    command = [vm, "run", "--kernel", "newest", "--timeout", "500", SCRIPT]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("all well\n"), done.stdout[-20_000:]
