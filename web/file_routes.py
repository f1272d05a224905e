"""/v1/files: files that clients upload to train on.

What a file is and whether it can be used is storage's matter; here are OpenAI's names for it.
"""

from http import HTTPStatus
from typing import Annotated, Any, BinaryIO, Literal, cast

from flask import Response, g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field, WithJsonSchema
from werkzeug.wsgi import wrap_file

from storage import user_files
from storage.errors import BadName, NotLoadable
from storage.user_files import UserFile
from training import fine_tuning
from web.context import Context, context
from web.errors import Refused
from web.openai_schemas import OpenAIError
from web.paging import PageQuery, page
from web.schemas import BEFORE_ROUTES, FileForm, Reply
from web.strict_json import expect_upload

PAGE = 10_000
TYPES = {".jsonl": "application/jsonl", ".txt": "text/plain; charset=utf-8", "": "application/octet-stream"}
ERRORS: dict[str | int | HTTPStatus, Any] = dict.fromkeys((*BEFORE_ROUTES, 400, 401, 403, 413, 415), OpenAIError)

routes = APIBlueprint("files", __name__, abp_tags=[Tag(name="OpenAI")], abp_responses=ERRORS)


class PurposeForm(FileForm):
    """A file and what it is for."""

    purpose: Annotated[Any, WithJsonSchema({"type": "string", "enum": list(user_files.PURPOSES)})] = Field(
        description="fine-tune: the file is checked as training data"
    )


class FilePath(BaseModel):
    """A file's id in the path."""

    file_id: str


class FilesQuery(PageQuery):
    """Which files."""

    order: Literal["asc", "desc"] = Field("desc", description="by time of creation")
    purpose: str | None = Field(None, max_length=100, description="only files for this")


class FileObject(Reply):
    """An uploaded file."""

    id: str
    object: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str


class FileList(Reply):
    """A page of files."""

    object: str
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Deleted(Reply):
    """What was deleted."""

    id: str
    object: str
    deleted: bool


def describe(file: UserFile) -> dict[str, Any]:
    """Return OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created),
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }


@routes.before_request
def _expect_upload() -> None:
    if request.endpoint == "files.upload":
        expect_upload(context().settings.max_upload_bytes)


@routes.post("/v1/files", responses={200: FileObject, 413: OpenAIError})
def upload(form: PurposeForm) -> dict[str, Any]:
    """Upload a file; a training file is checked, and its status says whether it can be used."""
    ctx = context()
    g.ignored_params = sorted({name.partition("[")[0] for name in request.form} - {"purpose", "file"})
    stream, limit = cast(BinaryIO, form.file.stream), ctx.settings.max_upload_bytes
    try:
        return describe(user_files.save(ctx.workspace, form.file.filename, form.purpose, stream, limit))
    except NotLoadable as error:
        raise Refused(400, str(error), "invalid_file", "file") from None
    except BadName as error:
        param = "file" if form.purpose in user_files.PURPOSES else "purpose"
        raise Refused(400, str(error), param=param) from None


@routes.get("/v1/files", responses={200: FileList})
def files(query: FilesQuery) -> dict[str, Any]:
    """List the files."""
    found = user_files.user_files(context().workspace)
    found = [file for file in found if query.purpose in (None, file.purpose)]
    return page(found if query.order == "desc" else found[::-1], query, PAGE, lambda file: file.id, describe)


@routes.get("/v1/files/<file_id>", responses={200: FileObject, 404: OpenAIError})
def file(path: FilePath) -> dict[str, Any]:
    """Describe a file."""
    return describe(user_files.user_file(context().workspace, path.file_id))


@routes.get(
    "/v1/files/<file_id>/content",
    responses={
        200: {"description": "the bytes", "content": {kind: {"schema": {"type": "string"}} for kind in TYPES.values()}},
        404: OpenAIError,
    },
)
def content(path: FilePath) -> Response:
    """Return a file's bytes, for saving and not for showing."""
    found = user_files.user_file(context().workspace, path.file_id)
    suffix = found.stored_as[found.stored_as.find(".") :] if "." in found.stored_as else ""
    reply = Response(wrap_file(request.environ, found.open()), content_type=TYPES[suffix], direct_passthrough=True)
    reply.content_length = found.bytes
    reply.headers["Content-Disposition"] = f'attachment; filename="{found.id}{suffix}"'
    return reply


def _require_unused(ctx: Context, found: UserFile) -> None:
    made = user_files.datasets_of(ctx.workspace, found)
    for job in ctx.jobs.list() if made else ():
        if job.describe()["config"].get("dataset") not in made:
            continue
        run = ctx.workspace.run(job.name)
        if fine_tuning.status(job.describe(), run) in fine_tuning.UNFINISHED:
            raise Refused(400, f"{fine_tuning.job_id(job.name)} trains on {found.id}; cancel it first", "file_in_use")


@routes.delete("/v1/files/<file_id>", responses={200: Deleted, 404: OpenAIError})
def delete_file(path: FilePath) -> dict[str, Any]:
    """Delete a file, and the dataset that was made of it; not while a job needs them."""
    ctx = context()
    found = user_files.user_file(ctx.workspace, path.file_id)
    _require_unused(ctx, found)
    user_files.delete(ctx.workspace, found)
    return {"id": found.id, "object": "file", "deleted": True}
