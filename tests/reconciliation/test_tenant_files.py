"""A tenant's path never leads out of the tenant's directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from settler_streams.errors import InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.reconciliation.tenant_files import read_tenant_file

ANNA = TenantId("0197e000-0000-7000-8000-00000000000a")
BERT = TenantId("0197e000-0000-7000-8000-00000000000b")


@pytest.fixture
def sets_dir(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for tenant in (ANNA, BERT):
        (root / tenant / "may").mkdir(parents=True)
        (root / tenant / "may" / "ledger.csv").write_bytes(f"of {tenant}".encode())
    (tmp_path / "outside.csv").write_bytes(b"outside")
    return root


def test_a_file_in_the_directory_is_read(sets_dir: Path) -> None:
    assert read_tenant_file(ANNA, sets_dir, "may/ledger.csv") == f"of {ANNA}".encode()


def test_a_link_that_stays_inside_is_followed(sets_dir: Path) -> None:
    (sets_dir / ANNA / "latest").symlink_to("may")
    (sets_dir / ANNA / "now.csv").symlink_to(sets_dir / ANNA / "latest" / "ledger.csv")
    assert read_tenant_file(ANNA, sets_dir, "latest/ledger.csv") == f"of {ANNA}".encode()
    assert read_tenant_file(ANNA, sets_dir, "now.csv") == f"of {ANNA}".encode()


def test_the_sets_directory_itself_may_be_a_link(sets_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sets_dir)
    assert read_tenant_file(ANNA, tmp_path / "link", "may/ledger.csv") == f"of {ANNA}".encode()


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "/etc/passwd",
        "../outside.csv",
        f"../{BERT}/may/ledger.csv",
        f"may/../../{BERT}/may/ledger.csv",
        "may/../may/ledger.csv",
        "may/ledger.csv\0.txt",
        "may",
        "missing.csv",
        "may/ledger.csv/x",
        "\udcff",
        "a" * 5_000,
    ],
)
def test_a_path_that_is_not_a_plain_file_below_is_refused(sets_dir: Path, path: str) -> None:
    with pytest.raises(InvalidRequestError, match="path"):
        read_tenant_file(ANNA, sets_dir, path)


def test_links_that_leave_are_refused(sets_dir: Path, tmp_path: Path) -> None:
    home = sets_dir / ANNA
    (home / "file").symlink_to(tmp_path / "outside.csv")
    (home / "folder").symlink_to(sets_dir / BERT)
    (home / "up").symlink_to("..")
    (home / "loop").symlink_to("loop")
    (home / "device").symlink_to("/dev/zero")
    for path in ("file", "folder/may/ledger.csv", f"up/{BERT}/may/ledger.csv", "loop", "device", "up"):
        with pytest.raises(InvalidRequestError, match="path"):
            read_tenant_file(ANNA, sets_dir, path)


def test_a_sibling_whose_name_starts_alike_is_outside(sets_dir: Path) -> None:
    (sets_dir / f"{ANNA}-old").mkdir()
    (sets_dir / f"{ANNA}-old" / "x.csv").write_bytes(b"old")
    (sets_dir / ANNA / "old").symlink_to(sets_dir / f"{ANNA}-old")
    with pytest.raises(InvalidRequestError, match="not inside"):
        read_tenant_file(ANNA, sets_dir, "old/x.csv")


def test_a_tenant_directory_that_is_a_link_is_refused(sets_dir: Path) -> None:
    eve = TenantId("0197e000-0000-7000-8000-00000000000e")
    (sets_dir / eve).symlink_to(sets_dir / BERT)
    with pytest.raises(InvalidRequestError, match="path"):
        read_tenant_file(eve, sets_dir, "may/ledger.csv")


@pytest.mark.parametrize("tenant", ["..", "", ".", BERT.upper(), f"{BERT}/may", f"{ANNA}/../{BERT}"])
def test_a_tenant_that_is_not_an_id_is_refused(sets_dir: Path, tenant: str) -> None:
    with pytest.raises(InvalidRequestError):
        read_tenant_file(TenantId(tenant), sets_dir, "may/ledger.csv")


def test_a_pipe_is_refused_without_waiting_for_its_writer(sets_dir: Path) -> None:
    os.mkfifo(sets_dir / ANNA / "pipe")
    with pytest.raises(InvalidRequestError, match="regular file"):
        read_tenant_file(ANNA, sets_dir, "pipe")


def test_a_file_is_read_up_to_its_limit(sets_dir: Path) -> None:
    (sets_dir / ANNA / "ten").write_bytes(b"0123456789")
    assert read_tenant_file(ANNA, sets_dir, "ten", bytes_max=10) == b"0123456789"
    with pytest.raises(InvalidRequestError, match="larger than 9 bytes"):
        read_tenant_file(ANNA, sets_dir, "ten", bytes_max=9)


@pytest.mark.parametrize("swapped", ["may", "may/ledger.csv"])
def test_a_link_that_appears_after_the_check_is_not_followed(
    sets_dir: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = os.path.realpath

    def resolve_then_swap(path: os.PathLike[str], *, strict: bool = False) -> str:
        resolved = resolve(path, strict=strict)
        if strict:
            target = sets_dir / ANNA / swapped
            target.rename(sets_dir / ANNA / "moved")
            target.symlink_to(sets_dir / BERT / swapped)
        return resolved

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    with pytest.raises(InvalidRequestError, match="cannot be opened"):
        read_tenant_file(ANNA, sets_dir, "may/ledger.csv")


def test_descriptors_are_closed(sets_dir: Path) -> None:
    def opened() -> set[tuple[int, int]]:
        """What this process has open, by device and inode; other threads open and close things of their own."""
        found = set()
        for descriptor in Path("/dev/fd").iterdir():
            with contextlib.suppress(OSError):
                status = os.fstat(int(descriptor.name))
                found.add((status.st_dev, status.st_ino))
        return found

    places = {(status.st_dev, status.st_ino) for status in map(Path.stat, (sets_dir, *sets_dir.rglob("*")))}
    for path in ("may/ledger.csv", "may", "may/ledger.csv/x", "missing"):
        try:
            read_tenant_file(ANNA, sets_dir, path)
        except InvalidRequestError:
            continue
    assert not opened() & places
    with (sets_dir / ANNA / "may" / "ledger.csv").open():
        assert opened() & places, "one that is open would be seen"
