"""The reader of critest's report: every spec keeps its verdict and its reason."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.conformance import KNOWN, Spec, read_report, totals


def entry(text: str, state: str, message: str = "", kind: str = "It") -> dict[str, Any]:
    failure = {"Message": message, "Location": {"FileName": "/src/pod.go", "LineNumber": 12}} if message else {}
    return {
        "ContainerHierarchyTexts": ["[k8s.io] Group", "nested"] if kind == "It" else None,
        "LeafNodeText": text,
        "LeafNodeType": kind,
        "State": state,
        "RunTime": 1_500_000_000,
        "Failure": failure,
    }


def read(*entries: dict[str, Any]) -> list[Spec]:
    return read_report([{"SpecReports": list(entries)}], KNOWN)


def test_each_state_is_told_apart() -> None:
    specs = read(
        entry("works", "passed"),
        entry("breaks", "failed", "expected 1\nto equal 2"),
        entry("needs more", "skipped", "not supported"),
        entry("filtered out", "skipped"),
        entry("hangs", "timedout", "took too long"),
    )
    assert [spec.state for spec in specs] == ["pass", "fail", "skip", "unselected", "fail"]
    assert specs[0] == Spec("Group :: nested :: works", "pass", 1.5)
    assert specs[1].text == "expected 1\nto equal 2"
    assert specs[1].where == "pod.go:12"
    assert totals(specs) == "1 passed, 2 failed, 1 skipped, 0 failed for known reasons, 1 not selected"


@pytest.mark.parametrize("part", KNOWN)
def test_a_known_failure_gives_its_reason_and_a_pass_stays_a_pass(part: str) -> None:
    failed, passed = read(entry(f"{part} [Conformance]", "failed", "no"), entry(f"{part} [Conformance]", "passed"))
    assert (failed.state, failed.text) == ("known", KNOWN[part])
    assert passed.state == "pass"


def test_a_known_failure_is_a_failure_where_nothing_is_known() -> None:
    part = next(iter(KNOWN))
    (spec,) = read_report([{"SpecReports": [entry(part, "failed", "no")]}], {})
    assert spec.state == "fail"


def test_a_suite_that_fails_before_its_specs_is_a_failure() -> None:
    (spec,) = read(entry("", "failed", "cannot connect", kind="BeforeSuite"), entry("", "passed", kind="AfterSuite"))
    assert (spec.name, spec.state, spec.text) == ("BeforeSuite", "fail", "cannot connect")


def test_an_empty_report_has_no_specs() -> None:
    assert read_report([{"SpecReports": None}], KNOWN) == []
