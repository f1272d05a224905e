"""/v1/files: uploads, their check, pages, content and deletion."""

import errno
import fcntl
import gzip
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import pytest
from fakes import FakeServer

from storage import user_files
from storage.errors import NotFound

GOOD = b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "", "completion": "c"}\n{"prompt": "d", "completion": ""}\n'


@pytest.fixture
def server(tmp_path):
    return FakeServer(tmp_path, None, max_upload_bytes=100_000)


def send(server, data=GOOD, filename="train.jsonl", purpose="fine-tune", **more):
    form = {"file": (io.BytesIO(data), filename), "purpose": purpose, **more}
    return server.client.post("/v1/files", data=form, content_type="multipart/form-data")


def upload(server, *args, **more):
    reply = send(server, *args, **more)
    assert reply.status_code == 200, reply.json
    return reply.json


def ids(reply):
    return [file["id"] for file in reply.json["data"]]


def test_an_upload_is_checked_and_described(server):
    file = upload(server)
    assert file["id"].startswith("file-") and file["object"] == "file" and type(file["created_at"]) is int
    assert file["status"] == "processed" and file["status_details"] is None
    assert (file["bytes"], file["filename"], file["purpose"]) == (len(GOOD), "train.jsonl", "fine-tune")
    assert server.get(f"/v1/files/{file['id']}").json == file


def test_the_fields_of_the_form_may_come_in_any_order(server):
    for fields in (["purpose", "file"], ["file", "purpose"]):
        values = {"purpose": "fine-tune", "file": (io.BytesIO(GOOD), "a.jsonl")}
        form = {name: values[name] for name in fields}
        assert server.client.post("/v1/files", data=form).json["status"] == "processed"


@pytest.mark.parametrize(
    ("data", "filename", "words"),
    [
        (b'{"text": "a"}\nnot json\n', "a.jsonl", "line 2: it is not JSON"),
        (b'{"text": "a"}\n\n{"prompt": "x"}\n', "a.jsonl", 'line 3: it has none of "text"'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl", "line 2: it is not UTF-8"),
        (b'{"messages": [{"role": "user"}]}\n', "a.jsonl", "line 1: messages[0].content is missing"),
        (
            GOOD + b'{"text": "a"}\n',
            "a.jsonl",
            "line 5: it has the format text and the lines before it prompt_completion",
        ),
        (b"[1]\n", "a.jsonl", "line 1: it is not a JSON object"),
        (b"[" * 100_000, "a.jsonl", "line 1: it is n"),
        (b"x\n" * 9, "a.jsonl", "and 4 more lines"),
        (b"", "a.jsonl", "no line of JSON"),
        (b'{"text": ""}\n', "a.jsonl", "no text"),
        (b"", "a.txt", "no text"),
        (b"abc\xff", "a.txt", "not UTF-8 text at byte 3"),
        (b"abc\0", "a.txt", "NUL byte at byte 3"),
        (b"cbuiltins\nopen\n\0", "meta.pkl", "NUL byte"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(server, data, filename, words):
    file = upload(server, data, filename)
    assert file["status"] == "error" and words in file["status_details"]


@pytest.mark.parametrize("filename", ["a.txt", "upload", "b"])
def test_plain_text_is_fine(server, filename):
    assert upload(server, "Once upon a time, é.\n".encode(), filename)["status"] == "processed"


def test_a_nameless_jsonl_is_known_by_its_beginning(server):
    assert upload(server, GOOD, "upload")["status"] == "processed"
    assert upload(server, b"{x\n", "upload")["status"] == "error"


def test_files_for_other_purposes_are_kept_as_they_are(server):
    file = upload(server, b"\0\1\2", "picture.bin", "vision")
    assert file["status"] == "processed"
    with server.get(f"/v1/files/{file['id']}/content") as reply:
        assert reply.data == b"\0\1\2"


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [gzip.compress(b"x", mtime=0), b"PK\3\4rest", b"7z\xbc\xaf\x27\x1c", tar()])
def test_archives_are_refused(server, data):
    reply = send(server, data)
    assert reply.status_code == 400 and "archive" in reply.json["error"]["message"]
    assert server.get("/v1/files").json["data"] == []


@pytest.mark.parametrize("name", ["../../../../tmp/canary", "..\\..\\x.jsonl", "/etc/passwd", ".bashrc", "a;id.jsonl"])
def test_the_clients_name_decides_no_path(server, tmp_path, name):
    file = upload(server, GOOD, name)
    stored = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert stored == [f"state/files/{file['id']}/{part}" for part in ("documents.jsonl", "file.json")]
    assert "/" not in file["filename"] and "\\" not in file["filename"]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"purpose": "fine-tune"}, "file"),
        ({"file": (io.BytesIO(GOOD), "a.jsonl")}, "purpose"),
        ({"file": (io.BytesIO(GOOD), "a.jsonl"), "purpose": "../../x"}, "purpose is"),
        ({"file": (io.BytesIO(GOOD), "a" * 300), "purpose": "fine-tune"}, "300 characters"),
        ({"file": "a text", "purpose": "fine-tune"}, "file is a text"),
        ({}, "required"),
    ],
)
def test_a_wrong_form_is_refused_by_name(server, form, words):
    reply = server.client.post("/v1/files", data=form, content_type="multipart/form-data")
    assert reply.status_code == 400 and words in reply.json["error"]["message"]


def test_json_is_no_upload(server):
    reply = server.post("/v1/files", {"file": "a", "purpose": "fine-tune"})
    assert reply.status_code == 415 and "multipart/form-data" in reply.json["error"]["message"]


def test_a_compressed_form_is_refused(server):
    form = {"file": (io.BytesIO(GOOD), "a.jsonl"), "purpose": "fine-tune"}
    assert server.client.post("/v1/files", data=form, headers={"Content-Encoding": "gzip"}).status_code == 415


def test_a_large_file_is_refused_and_leaves_nothing(server, tmp_path):
    assert send(server, b"x" * 100_001, "a.txt").status_code == 413
    assert send(server, b"x" * 400_000, "a.txt").status_code == 413
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_other_fields_are_ignored_and_named(server):
    reply = send(server, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert reply.status_code == 200 and reply.headers["X-Ignored-Params"] == "expires_after"


def test_the_list_comes_in_pages_newest_first(server):
    made = [upload(server)["id"] for _ in range(5)]
    seen, after = [], None
    while True:
        reply = server.get("/v1/files", query_string={"limit": 2} | ({} if after is None else {"after": after}))
        seen += ids(reply)
        assert reply.json["first_id"] == ids(reply)[0] and reply.json["last_id"] == ids(reply)[-1]
        after = reply.json["last_id"]
        if not reply.json["has_more"]:
            break
    assert seen == made[::-1]


def test_the_list_can_be_turned_and_filtered(server):
    made = [upload(server)["id"] for _ in range(3)]
    other = upload(server, purpose="assistants")["id"]
    assert ids(server.get("/v1/files?order=asc&purpose=fine-tune")) == made
    assert ids(server.get("/v1/files?purpose=assistants")) == [other]
    empty = server.get("/v1/files?purpose=batch").json
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("query", ["after=file-nobody", "limit=0", "limit=-1", "limit=x", "limit=1e99", "order=up"])
def test_a_wrong_page_is_refused(server, query):
    upload(server)
    reply = server.get(f"/v1/files?{query}")
    assert reply.status_code == 400 and reply.json["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize("name", ["file-nope", "file-" + "0" * 24, "..%2f..%2fetc%2fpasswd", "file-1%00", "."])
def test_an_unknown_file_is_not_found(server, name):
    upload(server)
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert server.get(path).status_code == 404
    assert server.client.delete(f"/v1/files/{name}").status_code in (404, 405)


def test_the_content_is_sent_for_saving_only(server):
    file = upload(server, b"<script>alert(1)</script>", "evil.html")
    with server.get(f"/v1/files/{file['id']}/content") as reply:
        assert reply.data == b"<script>alert(1)</script>" and reply.content_length == file["bytes"]
    assert reply.headers["Content-Disposition"] == f'attachment; filename="{file["id"]}.txt"'
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and "html" not in reply.content_type


def test_a_deleted_file_is_gone_with_its_dataset(server, tmp_path):
    file = upload(server)
    user_files.as_dataset(server.workspace, user_files.user_file(server.workspace, file["id"]))
    reply = server.client.delete(f"/v1/files/{file['id']}", headers={"Content-Type": "application/json"})
    assert reply.json == {"id": file["id"], "object": "file", "deleted": True}
    assert server.get(f"/v1/files/{file['id']}").status_code == 404
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_file_that_was_cut_short_is_refused_and_not_promised_whole(server, tmp_path):
    file = upload(server)
    os.truncate(tmp_path / "state/files" / file["id"] / "documents.jsonl", 3)
    reply = server.get(f"/v1/files/{file['id']}/content")
    assert reply.status_code == 422 and f"3 of its {file['bytes']} bytes are there" in reply.json["error"]["message"]


def test_on_a_read_only_disk_a_file_is_not_deleted(server, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    file = upload(server)["id"]
    monkeypatch.setattr(os, "rename", refuse)
    reply = server.client.delete(f"/v1/files/{file}")
    assert reply.status_code == 400 and "the disk is read-only" in reply.json["error"]["message"]
    assert server.get(f"/v1/files/{file}").status_code == 200


def test_a_link_in_the_folder_is_no_file(server, tmp_path):
    upload(server)
    (tmp_path / "state/files" / ("file-" + "a" * 24)).symlink_to("/etc")
    assert server.get("/v1/files/file-" + "a" * 24).status_code == 404
    assert len(ids(server.get("/v1/files"))) == 1


def test_a_check_that_was_interrupted_is_made_up_for_at_the_next_look(server):
    file = user_files.user_file(server.workspace, upload(server)["id"])
    user_files.UserFile(**file.__dict__ | {"status": "uploaded"}).write()
    assert server.get("/v1/files").json["data"][0]["status"] == "uploaded"
    assert server.get(f"/v1/files/{file.id}").json["status"] == "processed"


def test_one_check_at_a_time(server):
    file = user_files.user_file(server.workspace, upload(server)["id"])
    waiting = user_files.UserFile(**file.__dict__ | {"status": "uploaded"})
    waiting.write()
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert user_files.settled(waiting).status == "uploaded"
    assert user_files.settled(waiting).status == "processed"


def test_what_a_crash_left_is_swept(server, tmp_path):
    file = upload(server)
    for parent in (tmp_path / "state/files", tmp_path / "data"):
        (parent / ".x.0123456789abcdef.tmp/y").mkdir(parents=True)
    user_files.sweep(server.workspace)
    assert [path.name for path in (tmp_path / "state/files").iterdir()] == [file["id"]]
    assert list((tmp_path / "data").iterdir()) == []


def test_many_uploads_at_once_get_ids_of_their_own(server):
    threads = [threading.Thread(target=lambda: send(server)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids(server.get("/v1/files")))) == 8


def test_of_several_requests_that_make_a_dataset_of_one_file_all_get_it(server, monkeypatch):
    file = user_files.user_file(server.workspace, upload(server)["id"])
    copy = user_files._copy_into

    def slowly(folder, file, name):
        monkeypatch.setattr(user_files, "_copy_into", copy)
        copy(folder, file, name)
        assert user_files.as_dataset(server.workspace, file) == file.id  # meanwhile, for another request

    monkeypatch.setattr(user_files, "_copy_into", slowly)
    assert user_files.as_dataset(server.workspace, file) == file.id
    assert [path.name for path in server.workspace.data.iterdir()] == [file.id]


def test_of_several_requests_that_delete_a_file_one_does(server):
    file = user_files.user_file(server.workspace, upload(server)["id"])
    user_files.delete(server.workspace, file)
    with pytest.raises(NotFound, match=file.id):
        user_files.delete(server.workspace, file)


@pytest.mark.parametrize("value", ["x", None, [1], {}])
@pytest.mark.parametrize("name", ["created", "bytes", "filename", "stored_as", "status", "status_details", "odd"])
def test_a_file_with_a_damaged_description_hides_no_other(server, name, value):
    good, bad = upload(server)["id"], upload(server)["id"]
    description = server.workspace.root / "state" / "files" / bad / "file.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {name: value}))
    assert good in ids(server.get("/v1/files"))
    assert server.get(f"/v1/files/{bad}").status_code in (200, 422)


def test_half_of_a_surrogate_pair_in_a_description_is_told_as_something_else(server):
    file = upload(server)["id"]
    description = server.workspace.root / "state" / "files" / file / "file.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"filename": "é\ud800.jsonl"}))
    assert server.get(f"/v1/files/{file}").json["filename"] == "é?.jsonl"


def test_an_upload_to_a_disk_that_cannot_be_written_is_refused(server, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    reply = send(server)
    assert reply.status_code == 400 and "the disk is read-only" in reply.json["error"]["message"]


@pytest.mark.parametrize("place", ["state", "state/files"])
def test_an_upload_where_a_file_is_in_the_place_of_the_folder_is_refused(server, tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    reply = send(server)
    assert reply.status_code == 400 and "a file is in the place of a folder" in reply.json["error"]["message"]


def test_the_validation_file_is_what_a_dataset_validates_on(server):
    training, validation = (
        user_files.user_file(server.workspace, upload(server, data)["id"])
        for data in (b'{"text": "train"}\n' * 20, b'{"text": "val"}\n')
    )
    name = user_files.as_dataset(server.workspace, training, validation)
    assert user_files.as_dataset(server.workspace, training, validation) == name
    assert sorted(path.name for path in (server.workspace.data / name).iterdir()) == ["documents.jsonl", "val.jsonl"]
    assert name in user_files.datasets_of(server.workspace, validation)
