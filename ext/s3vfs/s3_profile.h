/* s3_profile.h - AWS profile files: what ~/.aws/credentials and ~/.aws/config say about one profile.
 *
 * In the credentials file a profile is the section [name]; in the config file it is [profile name], or [default]. Other
 * sections of the config file have a kind and a name too: [services name]. A property is "name = value"; one without a value
 * may have properties of its own in the lines behind it that are indented deeper:
 *
 *     [profile cold]
 *     region = eu-west-1
 *     s3 =
 *       addressing_style = path
 *
 * Lines that begin with # or ; are comments, and so is the rest of a value behind a blank and # or ;. Sections of the same
 * name are one; the last of several values holds. The files are hostile: bounded, and nothing in them can do more than give
 * a value or none. A value never enters a message.
 */
#ifndef S3_PROFILE_H
#define S3_PROFILE_H
#include <stddef.h>

#include "../base/vs_err.h"

enum { S3_PROFILE_CREDENTIALS, S3_PROFILE_CONFIG, S3_PROFILE_FILES };

typedef struct s3_profile_file {
  char *path;  /* NULL: neither the environment nor HOME says where */
  char *text;  /* NULL: could not be opened; may hold anything, NUL too */
  size_t n;    /* bytes of text */
  int failure; /* errno of opening, 0 when there is a text */
} s3_profile_file;

enum { S3_SHOWN_CHARS = 60 };
typedef struct s3_profile {
  const char *name;               /* AWS_PROFILE or "default"; the environment's: use it before the environment changes */
  char shown[S3_SHOWN_CHARS + 1]; /* the name for messages: cut, without control characters */
  s3_profile_file file[S3_PROFILE_FILES];
} s3_profile;

/* Reads AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE, AWS_CONFIG_FILE, HOME, and the files. A file that is not there counts as
 * empty; one that the environment names and that cannot be read, or that is larger than 1 MiB, is an error; so is an
 * AWS_PROFILE that neither file has. */
vs_rc s3_profile_load(s3_profile *out, vs_err *err) VS_WARN_UNUSED;
void s3_profile_reset(s3_profile *p); /* wipes; legal on a zeroed struct */

/* *value: malloc'ed, NULL when there is none or an empty one. parent: NULL, or the property below which it stands.
 * VS_INVALID when it holds a control character. */
vs_rc s3_profile_get_from(const s3_profile *p, int file, const char *parent, const char *property, char **value,
                          vs_err *err) VS_WARN_UNUSED;
/* From the credentials file, else from the config file. */
vs_rc s3_profile_get(const s3_profile *p, const char *parent, const char *property, char **value, vs_err *err) VS_WARN_UNUSED;
/* The endpoint_url for s3 of the services section that the profile names; naming one that is not there is VS_INVALID. */
vs_rc s3_profile_service_endpoint(const s3_profile *p, char **value, vs_err *err) VS_WARN_UNUSED;

const char *s3_env(const char *name); /* NULL when not set or empty */
int s3_has_control(const char *p, size_t n);

#endif
