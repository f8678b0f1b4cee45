"""A small S3 client for the tests, on the standard library: signs with Signature Version 4, retries nothing, hides nothing.

    c = Client("http://127.0.0.1:9000", "ACCESS", "secret")
    c.put("bucket", "a/key", b"bytes")                   ETag
    c.get("bucket", "a/key", 10, 5)                      the five bytes from 10 on; without numbers all
    c.head("bucket", "a/key")                            headers, names in lower case
    c.list("bucket", "a/")                               keys; c.entries(...) for all that a listing says
    c.request("GET", "bucket", "a/key", headers={...})   an Answer of any status; the others raise S3Error from 300 on

Every thread has a connection of its own. anonymous=True sends unsigned requests; virtual_host="s3.localhost" puts the bucket
into the Host header instead of the path.
"""
import datetime
import hashlib
import hmac
import http.client
import json
import threading
import time
import typing
import urllib.parse
import xml.etree.ElementTree

IDLE_S = 5  # a kept connection is not used again after this time: the server may be closing it just then
UNSIGNED = "UNSIGNED-PAYLOAD"


class Answer(typing.NamedTuple):
    status: int
    headers: dict  # names in lower case
    body: bytes

    @property
    def code(self):
        """What the store calls the error: "NoSuchKey"; "" when it does not say."""
        e = self.xml().find(".//{*}Code") if self.body.startswith(b"<") else None
        return "" if e is None else e.text

    def xml(self):
        return xml.etree.ElementTree.fromstring(self.body)


class S3Error(Exception):
    def __init__(self, what, answer):
        super().__init__("%s: %d %s" % (what, answer.status, answer.code))
        self.status, self.code, self.answer = answer.status, answer.code, answer


def encode(text, keep=""):
    return urllib.parse.quote(text, safe="-._~" + keep)


def encode_query(query):
    return "&".join(sorted("%s=%s" % (encode(k), encode(str(v))) for k, v in dict(query).items()))


class Client:
    def __init__(self, endpoint, access_key="", secret_key="", region="us-east-1", token=None, anonymous=False, virtual_host=None, timeout_s=60):
        u = urllib.parse.urlsplit(endpoint)
        self.endpoint, self.address, self.netloc = endpoint, (u.hostname, u.port), u.netloc
        self.access_key, self.secret_key, self.region, self.token = access_key, secret_key, region, token
        self.anonymous, self.virtual_host, self.timeout_s = anonymous, virtual_host, timeout_s
        self.local = threading.local()

    # ---- signing ----

    def place(self, bucket, key):
        """The Host header and the encoded path of an object."""
        if self.virtual_host and bucket:
            return "%s.%s:%d" % (bucket, self.virtual_host, self.address[1]), "/" + encode(key, "/")
        return self.netloc, "/" + encode(bucket) + ("/" + encode(key, "/") if key else "")

    def signature(self, method, path, query, headers, payload, stamp):
        """(scope, signed headers, signature); headers in lower case."""
        names = ";".join(sorted(headers))
        canonical = "\n".join([method, path, query, *("%s:%s" % (k, " ".join(str(headers[k]).split())) for k in sorted(headers)), "", names, payload])
        scope = "%s/%s/s3/aws4_request" % (stamp[:8], self.region)
        text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        k = ("AWS4" + self.secret_key).encode()
        for part in scope.split("/"):
            k = hmac.digest(k, part.encode(), "sha256")
        return scope, names, hmac.digest(k, text.encode(), "sha256").hex()

    def presign(self, method, bucket, key, expires_s=600, query=()):
        """A URL that anybody may use for a while."""
        host, path = self.place(bucket, key)
        stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        q = {**dict(query), "X-Amz-Algorithm": "AWS4-HMAC-SHA256", "X-Amz-Credential": "%s/%s/%s/s3/aws4_request" % (self.access_key, stamp[:8], self.region),
             "X-Amz-Date": stamp, "X-Amz-Expires": expires_s, "X-Amz-SignedHeaders": "host"}
        if self.token:
            q["X-Amz-Security-Token"] = self.token
        query = encode_query(q)
        return "http://%s%s?%s&X-Amz-Signature=%s" % (host, path, query, self.signature(method, path, query, {"host": host}, UNSIGNED, stamp)[2])

    # ---- requests ----

    def request(self, method, bucket="", key="", query=(), headers=None, body=b""):
        host, path = self.place(bucket, key)
        query = encode_query(query)
        h = {"host": host, **{k.lower(): v for k, v in (headers or {}).items()}}
        if not self.anonymous:
            stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
            h["x-amz-date"], h["x-amz-content-sha256"] = stamp, hashlib.sha256(body).hexdigest()
            if self.token:
                h["x-amz-security-token"] = self.token
            scope, names, signature = self.signature(method, path, query, h, h["x-amz-content-sha256"], stamp)
            h["authorization"] = "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%s" % (self.access_key, scope, names, signature)
        if body or method in ("PUT", "POST"):
            h["content-length"] = len(body)
        return self.send(method, path + ("?" + query if query else ""), h, body)

    def send(self, method, target, headers, body=b""):
        """A request as given, on this thread's connection; that is closed when anything goes wrong."""
        connection, used = getattr(self.local, "connection", (None, 0))
        self.local.connection = (None, 0)
        if connection is None or time.monotonic() - used > IDLE_S:
            if connection:
                connection.close()
            connection = http.client.HTTPConnection(*self.address, timeout=self.timeout_s)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, str(value))
            connection.endheaders(body or None)
            r = connection.getresponse()
            answer = Answer(r.status, {k.lower(): v for k, v in r.getheaders()}, r.read())
        except BaseException:
            connection.close()
            raise
        if r.will_close:
            connection.close()
        else:
            self.local.connection = (connection, time.monotonic())
        return answer

    def close(self):
        """Closes this thread's connection."""
        connection, _ = getattr(self.local, "connection", (None, 0))
        self.local.connection = (None, 0)
        if connection:
            connection.close()

    def checked(self, method, bucket, key="", **args):
        answer = self.request(method, bucket, key, **args)
        if answer.status >= 300:
            raise S3Error("%s s3://%s/%s" % (method, bucket, key), answer)
        return answer

    # ---- objects ----

    def put(self, bucket, key, body, exclusive=False, headers=None):
        """exclusive: only when there is no such object. Returns the ETag, with its quotes."""
        return self.checked("PUT", bucket, key, body=body, headers={**({"If-None-Match": "*"} if exclusive else {}), **(headers or {})}).headers["etag"]

    def get(self, bucket, key, off=None, n=None, headers=None):
        if off is not None:
            headers = {**(headers or {}), "Range": "bytes=%d-%s" % (off, "" if n is None else off + n - 1)}
        return self.checked("GET", bucket, key, headers=headers).body

    def head(self, bucket, key):
        return self.checked("HEAD", bucket, key).headers

    def delete(self, bucket, key):
        self.checked("DELETE", bucket, key)

    def copy(self, bucket, key, to):
        """Within a bucket."""
        self.checked("PUT", bucket, to, headers={"x-amz-copy-source": "/" + encode(bucket) + "/" + encode(key, "/")})

    def entries(self, bucket, prefix="", delimiter="", after="", page=1000):
        """{"key", "size", "etag", "modified"} for each object in order, {"prefix"} for what a delimiter folds; all pages."""
        query = {"list-type": 2, "prefix": prefix, "delimiter": delimiter, "start-after": after, "max-keys": page, "encoding-type": "url"}
        query = {k: v for k, v in query.items() if v != ""}
        while True:
            x = self.checked("GET", bucket, query=query).xml()
            for e in x.iterfind("{*}Contents"):
                yield {"key": urllib.parse.unquote(e.findtext("{*}Key")), "size": int(e.findtext("{*}Size")), "etag": e.findtext("{*}ETag"),
                       "modified": e.findtext("{*}LastModified")}
            for e in x.iterfind("{*}CommonPrefixes"):
                yield {"prefix": urllib.parse.unquote(e.findtext("{*}Prefix"))}
            if x.findtext("{*}IsTruncated") != "true":
                return
            query["continuation-token"] = x.findtext("{*}NextContinuationToken")

    def list(self, bucket, prefix="", **args):
        """Keys; prefixes as well where a delimiter is given."""
        return [e.get("key", e.get("prefix")) for e in self.entries(bucket, prefix, **args)]

    def uploads(self, bucket):
        """(key, upload id) of multipart uploads that were begun and neither finished nor aborted."""
        x = self.checked("GET", bucket, query={"uploads": ""}).xml()
        return [(e.findtext("{*}Key"), e.findtext("{*}UploadId")) for e in x.iterfind("{*}Upload")]

    # ---- buckets ----

    def create_bucket(self, bucket, acl=None):
        """acl: a canned one, such as "public-read"."""
        self.checked("PUT", bucket, headers={"x-amz-acl": acl} if acl else None)

    def set_policy(self, bucket, policy):
        self.checked("PUT", bucket, query={"policy": ""}, body=json.dumps(policy).encode())

    def allow(self, bucket, actions=("s3:GetObject", "s3:ListBucket")):
        """Lets everybody do these things, anonymous requests too: ("s3:GetObject",) makes a bucket that cannot be listed."""
        at = "arn:aws:s3:::" + bucket
        self.set_policy(bucket, {"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Principal": "*", "Action": list(actions), "Resource": [at, at + "/*"]}]})

    def buckets(self):
        return [e.text for e in self.checked("GET", "").xml().iterfind(".//{*}Bucket/{*}Name")]
