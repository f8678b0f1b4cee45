/* s3_profile.h - settings of the AWS profile files, ~/.aws/credentials and ~/.aws/config: hostile, bounded text. */
#ifndef S3_PROFILE_H
#define S3_PROFILE_H
#include "../base/vs_err.h"

/* What a profile says; NULL where it says nothing. */
typedef struct s3_profile {
  int found; /* a file has a section of this name */
  char *access_key, *secret_key, *session_token, *region, *endpoint_url, *addressing_style, *ca_bundle;
} s3_profile;

/* name: AWS_PROFILE, or "default". Missing files are no error; of both files the credentials file wins for keys. */
vs_rc s3_profile_load(const char *name, s3_profile *out, vs_err *err) VS_WARN_UNUSED;
void s3_profile_reset(s3_profile *p); /* wipes; legal on a zeroed struct */

/* A variable of the environment; NULL when it is not set or empty. */
const char *s3_env(const char *name);

#endif
