/* s3_config.h - where a bucket is and as whom to speak to it: URIs, environment, AWS profile files.
 *
 * Read as the AWS SDKs do: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; AWS_PROFILE with
 * AWS_SHARED_CREDENTIALS_FILE (~/.aws/credentials) and AWS_CONFIG_FILE (~/.aws/config); AWS_REGION, AWS_DEFAULT_REGION, the
 * profile's region; AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's endpoint_url (also of its `services` section for s3),
 * unless AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is true; the profile's `s3 = addressing_style`; AWS_CA_BUNDLE.
 * AWS_NO_SIGN_REQUEST=1 (or YES, true) asks for anonymous requests.
 */
#ifndef S3_CONFIG_H
#define S3_CONFIG_H
#include "../base/vs_err.h"

typedef struct s3_location {
  char *bucket;    /* NULL for a plain http(s):// URL */
  char *origin;    /* "https://bucket.s3.eu-west-1.amazonaws.com", "http://127.0.0.1:9000": no '/' at the end */
  char *host;      /* the Host header: origin without scheme, default ports left out */
  char *base_path; /* "" or "/bucket" (path style) or what the endpoint has in its path: stands before "/" + encoded key */
  char *region;    /* "us-east-1" when nothing says another */
  char *ca_bundle; /* NULL: the system's */
  int anonymous;   /* do not sign: asked for, or a plain URL */
} s3_location;

/* s3://bucket/key, http://host/path or https://host/path. *key (malloc'ed) is the unencoded key without leading '/', "" for a
 * bucket alone. For a plain URL *key is the encoded path with its query as given, to be sent as it is. Virtual-host style on
 * amazonaws.com for names that fit into a certificate's wildcard (no dots), path style else. VS_INVALID names what is wrong and
 * what a right URI looks like; credentials inside a URL (user:password@) are refused. */
vs_rc s3_locate(const char *uri, s3_location *out, char **key, vs_err *err) VS_WARN_UNUSED;
/* The same bucket in another region (S3 said so): new origin and host where they hold the region's name. */
vs_rc s3_relocate(s3_location *l, const char *region, vs_err *err) VS_WARN_UNUSED;
void s3_location_reset(s3_location *l); /* legal on a zeroed struct */

typedef struct s3_credentials { char *access_key, *secret_key, *session_token; /* token may be NULL */ } s3_credentials;
/* From the environment, else from the profile. VS_NOTFOUND says where was looked and what to set; no message ever holds a value. */
vs_rc s3_credentials_load(s3_credentials *out, vs_err *err) VS_WARN_UNUSED;
void s3_credentials_reset(s3_credentials *c); /* wipes; legal on a zeroed struct */

int s3_is_uri(const char *path); /* s3://, http:// or https:// */

#endif
