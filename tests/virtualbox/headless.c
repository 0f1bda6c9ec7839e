/* Stands in for VirtualBox's VBoxHeadless launcher where there is no kernel driver.
 *
 * The packaged launcher is hardened: it insists on the driver before it loads anything. VirtualBox's libraries
 * themselves can do without ("driverless"; the guest is then interpreted, about a hundred times slower). This launcher
 * does what the packaged one does after its checks: set up the runtime, open a session without a driver, load
 * VBoxHeadless.so and call its TrustedMain.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define FOLDER "/usr/lib/virtualbox/"
#define DRIVERLESS (1u << 2)             /* SUPR3INIT_F_DRIVERLESS, VBox/sup.h */
#define DRIVERLESS_INTERPRETER (1u << 3) /* SUPR3INIT_F_DRIVERLESS_IEM_ALLOWED */

static void *load(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!library) {
        fprintf(stderr, "virtualbox lab: %s\n", dlerror());
        exit(101);
    }
    return library;
}

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "virtualbox lab: %s\n", dlerror());
        exit(102);
    }
    return found;
}

int main(int count, char **words, char **environment)
{
    void *runtime = load(FOLDER "VBoxRT.so");
    int (*init_runtime)(int, char ***, uint32_t) = symbol(runtime, "RTR3InitExe");
    int (*init_support)(uint32_t, void **) = symbol(runtime, "SUPR3InitEx");
    void *session = NULL;
    int status = init_runtime(count, &words, 0);
    if (status >= 0)
        status = init_support(DRIVERLESS | DRIVERLESS_INTERPRETER, &session);
    if (status < 0) {
        fprintf(stderr, "virtualbox lab: VirtualBox status %d\n", status);
        return 103;
    }
    int (*trusted_main)(int, char **, char **) = symbol(load(FOLDER "VBoxHeadless.so"), "TrustedMain");
    return trusted_main(count, words, environment);
}
