"""What the fields of Dovecot's user database mean, in its versions 2.3 and 2.4, and that none is guessed at."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from test_users import JANE, Homes, homes_of, stored

from lmtpd import check_dovecot_fields, limits_in_dovecot_fields, maildir_in_dovecot_fields

OLD, NEW = 1, 3  # minor versions of the protocol
LONE = {"mail_uid": "8", "mail_gid": "8"}


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, ""),
        ({"mail_driver": "Maildir"}, ""),
        ({"mail_path": "/srv/mail/jane/"}, "/srv/mail/jane"),
        ({"mail_path": "~/Mail", "mail_driver": "maildir"}, "/home/jane/Mail"),
        ({"mail_path": "~"}, "/home/jane"),
        ({"mail_path": "~/Mail", "mail": "mbox:~/old"}, "/home/jane/Mail"),
        ({"mail_path": "~/Mail", "mail_inbox_path": "~/Mail/"}, "/home/jane/Mail"),
        ({"mail_inbox_path": "."}, ""),
    ],
)
def test_where_the_mail_is(fields: dict[str, str], path: str, version: int) -> None:
    check_dovecot_fields(fields, version)
    assert maildir_in_dovecot_fields(fields, "/home/jane") == path


@pytest.mark.parametrize(
    "fields",
    [
        {"mail_driver": "mbox"},
        {"mail_driver": ""},
        {"mail_driver": "auto", "mail_path": "~/Mail"},
        {"mail_path": ""},
        {"mail_path": "Mail"},
        {"mail_path": "~joe/Mail"},
        {"mail_path": "%{home}/Mail"},
        {"mail_path": "/Mail", "mail_inbox_path": ""},
        {"mail_path": "/Mail", "mail_inbox_path": "~/INBOX"},
        {"mail_inbox_path": "/var/mail/jane"},
        {"mail": "maildir:/Mail:LAYOUT=fs"},
        {"mail": "maildir:/Mail:INBOX=/var/mail/jane"},
        {"mail": "sdbox:/Mail"},
        {"mail": "maildir:~joe/Mail"},
        {"mail": "maildir:/Mail:INBOX=/var/mail/a++b"},
        {"mail": "maildir:/Mail:DIRNAME=mails"},
        {"mail": "maildir:/"},
        {"mail_path": "/"},
        *({name: "1"} for name in ("mail_control_path", "mail_volatile_path", "mail_location", "mail_future")),
        *({name: "1"} for name in ("quota", "quota_storage_percentage", "quota_ignore", "quota/User/storage_size")),
        *({name: "1"} for name in ("mailbox_list_layout", "maildir_copy_with_hardlinks", "namespace/inbox/location")),
        *({name: value} for name, value in LONE.items()),
    ],
)
def test_what_is_not_understood_is_no_place_for_mail(fields: dict[str, str]) -> None:

    def place() -> str:
        check_dovecot_fields(fields, OLD)
        return maildir_in_dovecot_fields(fields, "/home/jane")

    [(name, value), *_] = fields.items()
    with pytest.raises(ValueError, match=f"^{re.escape(name)}={re.escape(value)}: |^mail_inbox_path="):
        place()


@pytest.mark.parametrize(
    "fields",
    [
        {"uid": "8", **LONE},
        {"home": "/", "user": "jane", "foo": "", "master_user": "x", "acl_groups": "a"},
        *(
            {name: "1"}
            for name in ("mail_plugins", "mail_index_path", "mail_max_userip_connections", "mail_log_prefix")
        ),
        *({name: "1"} for name in ("quota_warning2", "quota_over_flag", "quota_rule2", "quota_storage_grace")),
        *({name: "1"} for name in ("quota_exceeded_message", "quota_grace")),
    ],
)
def test_what_changes_neither_place_nor_limit_is_let_through(fields: dict[str, str]) -> None:
    check_dovecot_fields(fields, NEW if "quota_rule" not in fields else OLD)


@pytest.mark.parametrize("field", ["mail", "quota_rule"])
def test_what_dovecot_24_ignores_is_not_taken_for_its_word(field: str) -> None:
    fields = {field: "maildir:/Mail"}
    check_dovecot_fields(fields, OLD)
    with pytest.raises(
        ValueError, match=rf"{field}=maildir:/Mail: Dovecot 2.4 ignores this field; set (mail_path|quota)"
    ):
        check_dovecot_fields(fields, NEW)
    check_dovecot_fields({**fields, "mail_path": "/Mail", "quota_storage_size": "1G"}, NEW)


@pytest.mark.parametrize(
    ("fields", "limits"),
    [
        ({}, None),
        ({"quota_storage_size": "20M"}, (20 << 20, 0)),
        ({"quota_storage_size": "1000", "quota_message_count": "7"}, (1000, 7)),
        ({"quota_storage_size": "3KiB"}, (3072, 0)),
        ({"quota_storage_size": "1gb"}, (1 << 30, 0)),
        ({"quota_storage_size": "unlimited"}, (0, 0)),
        ({"quota_message_count": "5"}, (0, 5)),
        ({"quota_storage_size": "unlimited", "quota_message_count": "unlimited"}, (0, 0)),
        ({"quota_storage_size": "2M", "quota_rule": "*:storage=1M"}, (2 << 20, 0)),
        (
            {"quota_rule": "*:storage=1M", "quota_rule2": "*:messages=3", "quota_rule3": "Trash:storage=+9M"},
            (1 << 20, 3),
        ),
        ({"quota_rule": "*:ignore"}, (0, 0)),
        ({"quota_rule": "*:storage=10"}, (10240, 0)),
    ],
)
def test_the_limits(fields: dict[str, str], limits: tuple[int, int] | None) -> None:
    assert limits_in_dovecot_fields(fields) == limits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quota_storage_size", "1.5M"),
        ("quota_storage_size", ""),
        ("quota_storage_size", "-1"),
        ("quota_storage_size", "10%"),
        ("quota_message_count", "1k"),
        ("quota_rule", "*:storage=10%"),
        ("quota_rule", "*:storage=+1M"),
        ("quota_rule", "*:messages=many"),
    ],
)
def test_a_limit_that_is_not_understood_is_shown(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"must|only") as raised:
        limits_in_dovecot_fields({name: value})
    assert f"{name}={value}" in str(raised.value)


# With the Dovecot at hand


@pytest.fixture
def homes() -> Iterator[Homes]:
    yield from homes_of("passwd-file")


def test_the_names_of_24_are_read_from_any_dovecot(homes: Homes) -> None:
    fields = {"mail_driver": "maildir", "mail_path": "~/Mail", "quota_storage_size": "100", "quota_message_count": "1"}
    home = homes.users.add("jane", JANE, **fields)
    assert homes.deliver("jane") == ["250 2.1.5"]
    assert homes.deliver("jane") == ["452 4.2.2"]
    assert len(stored(home / "Mail")) == 1
    assert (home / "Mail/maildirsize").read_text().startswith("100S,1C\n")


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("mail_control_path", "/x", "mail_control_path=/x: the field is not known, and may move or limit the mailbox"),
        (
            "quota_storage_size",
            "5x",
            "quota_storage_size=5x quota_message_count=: must be a size such as 1000, 64K or 20M",
        ),
    ],
)
def test_mail_waits_and_the_log_says_why(homes: Homes, name: str, value: str, cause: str) -> None:
    home = homes.users.add(name, JANE, **{name: value})
    assert homes.deliver(name) == ["451 4.3.0"]
    assert "user-database-unavailable" in homes.site.log_text()
    assert f'user={name} cause="{cause}' in homes.site.log_text()
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def sql_homes() -> Iterator[Homes]:
    yield from homes_of("sql")


@pytest.mark.parametrize("uid", ["4294967295", "4294967296", "99999999999999999999", "-5"])
def test_an_id_that_no_user_can_have_is_a_temporary_failure(sql_homes: Homes, uid: str) -> None:
    sql_homes.users.add_row(f"big{uid}", "/home/big", uid)
    assert sql_homes.deliver(f"big{uid}") == ["451 4.3.0"]
    assert "internal-error" not in sql_homes.site.log_text()
