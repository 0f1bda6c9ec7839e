/* Run a program inside the lab's root folder, in mounts of its own, as the caller.
 *
 * Called as VBoxManage (a name of a program in VBOX) or as `enter PROGRAM ARGUMENTS...`. The root folder is `root`
 * beside this file. The files `binds` beside it names folders, one a line, that are seen under the same path inside;
 * so the driver may name them to VirtualBox as it names them to everyone. A call costs about 2 ms more than without.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define VBOX "/usr/lib/virtualbox/"

static void fail(const char *what)
{
    fprintf(stderr, "virtualbox lab: %s: %s\n", what, strerror(errno));
    exit(120);
}

static void make_folders(char *path, size_t from)
{
    for (char *slash = strchr(path + from + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755);
        *slash = '/';
    }
    mkdir(path, 0755);
}

static void bind_at(const char *root, const char *folder, unsigned long more)
{
    char place[PATH_MAX];
    snprintf(place, sizeof place, "%s%s", root, folder);
    make_folders(place, strlen(root));
    if (mount(folder, place, NULL, MS_BIND | more, NULL) != 0)
        fail(place);
}

int main(int count, char **words)
{
    char self[PATH_MAX], root[PATH_MAX + 8], list[PATH_MAX + 8], here[PATH_MAX], program[PATH_MAX], line[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0 || !getcwd(here, sizeof here))
        fail("where am I");
    self[length] = 0;
    const char *lab = dirname(self);
    snprintf(root, sizeof root, "%s/root", lab);
    snprintf(list, sizeof list, "%s/binds", lab);

    const char *name = basename(strdup(words[0]));
    if (strcmp(name, "enter") == 0) {
        if (count < 2) {
            fprintf(stderr, "usage: enter PROGRAM ARGUMENTS...\n");
            return 2;
        }
        words++;
        snprintf(program, sizeof program, "%s", words[0]);
    } else {
        snprintf(program, sizeof program, VBOX "%s", name);
    }

    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        fail("a mount namespace (needs root)");
    bind_at(root, "/proc", 0);
    bind_at(root, "/sys", 0);
    bind_at(root, "/dev", MS_REC);
    FILE *binds = fopen(list, "r");
    if (!binds)
        fail(list);
    while (fgets(line, sizeof line, binds)) {
        line[strcspn(line, "\n")] = 0;
        if (line[0] == '/')
            bind_at(root, line, 0);
    }
    fclose(binds);
    if (chroot(root) != 0)
        fail(root);
    if (chdir(here) != 0 && chdir("/") != 0)
        fail(here);
    setenv("PATH", VBOX ":/usr/sbin:/usr/bin:/sbin:/bin", 1);
    execvp(program, words);
    fail(program);
}
