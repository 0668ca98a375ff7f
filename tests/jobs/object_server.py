"""A real S3 server on this machine (moto's), which can be told to be busy, to break a put, or to ignore conditions."""

import socket
import threading

import pytest

BUCKET = "samples"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # and s3fs tries once: what the engine itself does is seen
}


class Storage:
    """faults: by the end of a name, what happens to the next puts of it: [kind, …]. log: (method, key)."""

    def __init__(self, app):
        self.app, self.faults, self.log = app, {}, []
        self.conditional = True

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.log.append((method, path))
        if not self.conditional:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if method == "PUT" and (kinds := next((k for end, k in self.faults.items() if path.endswith(end)), None)):
            return getattr(self, kinds.pop(0))(environ, start_response)
        return self.app(environ, start_response)

    def busy(self, environ, start_response):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def cut(self, environ, start_response):
        """Half of the content is read, then the connection ends without an answer."""
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        return self._hang_up(environ)

    def unheard(self, environ, start_response):
        """The object is put, and nobody is told."""
        list(self.app(environ, lambda *answer: None))
        return self._hang_up(environ)

    def _hang_up(self, environ):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def forget(self):
        self.faults.clear()
        self.log.clear()
        self.conditional = True


@pytest.fixture(scope="module")
def storage():
    """The server; boto3 and s3fs find it by the environment."""
    pytest.importorskip("s3fs", reason="pip install 'sgm-engine[test]'")
    pytest.importorskip("moto", reason="pip install 'sgm-engine[test]'")
    pytest.importorskip("flask_cors", reason="pip install 'sgm-engine[test]'")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        disable_nagle_algorithm = True

        def log(self, *args):
            """Nothing."""

    found = Storage(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, found, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        found.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        for name, value in found.environment.items():
            patch.setenv(name, value)
        import s3fs

        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdirs(BUCKET, exist_ok=True)
        yield found
        s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()


@pytest.fixture
def url(storage, request, monkeypatch):
    """A prefix of this test's own."""
    monkeypatch.setattr("sgm_engine.files.storage.WAITS", (0.01, 0.01, 0.01))
    storage.forget()
    yield f"s3://{BUCKET}/{request.node.name}/run"
    storage.forget()


def objects(url):
    """Name → content, less what holds no samples and no record."""
    import s3fs

    fs, root = s3fs.S3FileSystem(), url.removeprefix("s3://")
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
