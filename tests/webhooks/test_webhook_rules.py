"""What a webhook is without a database: where it may go, how its secret is kept, what the settings take."""

from __future__ import annotations

import ipaddress

import pytest
from pydantic import SecretStr

from settler_streams.errors import ConfigurationError, InvalidRequestError
from settler_streams.services.webhooks import Destination, KeyRing, Rules, Sealed
from settler_streams.settings import Settings

STRICT = Rules(allow_http=False, allow_private=False)
OLD, NEW = "0f" * 32, "e1" * 32


def test_an_url_is_taken_apart() -> None:
    assert STRICT.destination("https://Hooks.Example.COM:8443/a/b?c=d") == Destination(
        "https", "hooks.example.com", 8443, "/a/b?c=d"
    )
    assert STRICT.destination("https://[2606:4700::1111]") == Destination("https", "2606:4700::1111", 443, "/")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://a.example/", "https only"),
        ("http://localhost/", "https only"),
        ("ftp://a.example/", "https://host"),
        ("a.example/hook", "https://host"),
        ("https:///hook", "its host"),
        ("https://a.example:0/", "https://host"),
        ("https://a.example:99999/", "[Pp]ort"),
        ("https://[::1/", "url: "),
        ("https://me@a.example/", "no user"),
        ("https://me:pass@a.example/", "no user"),
        ("https://a.example/#top", "fragment"),
        ("https://a.example/\r\nhost: b", "printable"),
        ("https://a.example/ä", "printable"),
        ("https://a b.example/", "printable"),
        ("https://a%2eb/", "its host"),
        ("https://a..example/", "its host"),
        ("https://-a.example/", "its host"),
        (f"https://{'a' * 64}.example/", "its host"),
        (f"https://{'a.' * 127}example/", "its host"),
        ("https://" + "a" * 2100, "printable"),
        ("https://127.0.0.1/", "not a public"),
        ("https://10.0.0.7/", "not a public"),
        ("https://169.254.169.254/latest/meta-data", "not a public"),
        ("https://100.64.0.1/", "not a public"),
        ("https://0.0.0.0/", "not a public"),
        ("https://[::1]/", "not a public"),
        ("https://[::]/", "not a public"),
        ("https://[fd00::1]/", "not a public"),
        ("https://[fe80::1]/", "not a public"),
        ("https://[::ffff:127.0.0.1]/", "not a public"),
        ("https://[64:ff9b::a00:1]/", "not a public"),
        ("https://[2002:a00:1::]/", "not a public"),
        ("https://224.0.0.1/", "not a public"),
        ("https://192.0.0.9/", "not a public"),
        ("https://192.0.0.192/opc/v2/", "not a public"),
        ("https://[64:ff9b::c000:c0]/", "not a public"),
        ("https://[64:ff9b:1::a00:1]/", "not a public"),
        ("https://[64:ff9b:1:a00:0:100::]/", "not a public"),
        ("https://[::10.0.0.7]/", "not a public"),
        ("https://[::808:808]/", "not a public"),
        ("https://[fec0::1]/", "not a public"),
        ("https://[feff::1]/", "not a public"),
        ("https://[3fff::1]/", "not a public"),
        ("https://[5f00::1]/", "not a public"),
    ],
)
def test_where_a_webhook_may_not_go(url: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        STRICT.destination(url)


def test_what_the_settings_open() -> None:
    local = Rules(allow_http=False, allow_private=True)
    for url in ("http://127.0.0.1:8080/", "http://localhost/", "https://10.0.0.7/", "http://[::1]/"):
        local.destination(url)
    for url in ("http://10.0.0.7/", "http://a.example/"):
        with pytest.raises(InvalidRequestError, match="https only"):
            local.destination(url)
    Rules(allow_http=True, allow_private=False).destination("http://a.example/")
    assert not local.allows(ipaddress.ip_address("224.0.0.1"))
    for public in ("93.184.215.14", "192.0.1.1", "2606:4700::1111", "64:ff9b::5db8:d70e"):
        assert STRICT.allows(ipaddress.ip_address(public)), public


def _ring(keys: str | None) -> KeyRing:
    return KeyRing(Settings(webhook_keys=None if keys is None else SecretStr(keys)))


def test_a_secret_opens_as_its_owners_alone_and_never_looks_the_same() -> None:
    ring = _ring(f"one:{OLD}")
    sealed = ring.seal(b"secret", "tenant/webhook")
    assert ring.open(sealed, "tenant/webhook") == b"secret"
    assert b"secret" not in sealed.blob
    assert ring.seal(b"secret", "tenant/webhook") != sealed
    with pytest.raises(ConfigurationError, match="row was altered"):
        ring.open(sealed, "tenant/another")
    with pytest.raises(ConfigurationError, match="row was altered"):
        ring.open(Sealed("one", sealed.blob[:-1] + bytes([sealed.blob[-1] ^ 1])), "tenant/webhook")


def test_a_new_key_encrypts_and_the_old_one_still_opens() -> None:
    sealed = _ring(f"old:{OLD}").seal(b"secret", "t/w")
    both = _ring(f"new:{NEW}, old:{OLD}")
    assert both.open(sealed, "t/w") == b"secret"
    assert both.seal(b"secret", "t/w").key_id == "new"
    with pytest.raises(ConfigurationError, match="no key 'old'"):
        _ring(f"new:{NEW}").open(sealed, "t/w")


def test_without_a_key_there_are_no_secrets() -> None:
    with pytest.raises(ConfigurationError, match="SETTLER_WEBHOOK_KEYS"):
        _ring(None).seal(b"secret", "t/w")


@pytest.mark.parametrize("keys", [OLD, f"one:{OLD[:-1]}", f"one:{OLD}x", f"ONE:{OLD}", f"a:{OLD},a:{NEW}", ",", ":"])
def test_keys_that_are_none_are_refused_and_not_quoted(keys: str) -> None:
    with pytest.raises(ConfigurationError, match="SETTLER_WEBHOOK_KEYS") as caught:
        Settings.from_environment({"SETTLER_WEBHOOK_KEYS": keys})
    assert OLD[:20] not in str(caught.value)


def test_keys_reach_a_child_process_and_no_representation() -> None:
    settings = Settings.from_environment({"SETTLER_WEBHOOK_KEYS": f"one:{OLD}"})
    assert settings.environment()["SETTLER_WEBHOOK_KEYS"] == f"one:{OLD}"
    assert OLD not in repr(settings)
