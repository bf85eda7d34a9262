// What a .cu text needs to be compiled as C++, and a loop that runs its kernels as a GPU would: every block has all its
// threads, and __syncthreads() waits for all of them. The threads are coroutines. Between two barriers they run one after the
// other, in an order that the caller chooses: if a barrier is missing, some order gives another result.

#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

using std::exp; using std::log; using std::nan; using std::rint; using std::sqrt; using std::tanh;

struct Index { unsigned int x; };
static Index blockIdx, threadIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() emulator::barrier(__LINE__)

namespace emulator {

const unsigned int MOST = 1024;
const size_t STACK = 1 << 16;

// setjmp and longjmp change from one stack to another without asking the operating system; ucontext only makes the stacks.
struct Thread {
    jmp_buf place;
    bool started;
    int line;  // of the barrier at which it waits; 0: it has left the kernel
};
static Thread threads[MOST];
static jmp_buf scheduler;
static unsigned int now;
static void (*kernel)(void **);
static void **arguments;

static void leave(int line)
{
    threads[now].line = line;
    if (!_setjmp(threads[now].place))
        _longjmp(scheduler, 1);
}

inline void barrier(int line) { leave(line); }

static void life()
{
    for (;;) {
        kernel(arguments);
        leave(0);
    }
}

static void resume(unsigned int thread)
{
    now = threadIdx.x = thread;
    if (_setjmp(scheduler))
        return;
    if (threads[thread].started)
        _longjmp(threads[thread].place, 1);
    threads[thread].started = true;
    static ucontext_t context, unused;
    getcontext(&context);
    context.uc_stack.ss_sp = std::malloc(STACK);  // for the life of the process
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, life, 0);
    swapcontext(&unused, &context);
}

// The numbers 0 to n - 1: ascending for order 0, descending for 1, else shuffled.
static void arrange(unsigned int *numbers, unsigned int n, unsigned int order)
{
    static unsigned long long state = 1;
    for (unsigned int i = 0; i < n; ++i)
        numbers[i] = order == 1 ? n - 1 - i : i;
    for (unsigned int i = n; order > 1 && i > 1; --i) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        const unsigned int j = (unsigned int)((state >> 33) % i), held = numbers[j];
        numbers[j] = numbers[i - 1];
        numbers[i - 1] = held;
    }
}

// Run blocks `first` to `stop` - 1 of a grid. Returns 0, or the line of a barrier that not all threads of a block reached.
extern "C" int launch(void (*function)(void **), void **values, unsigned int grid, unsigned int size, unsigned int first,
                      unsigned int stop, unsigned int order)
{
    unsigned int turns[MOST];
    kernel = function;
    arguments = values;
    gridDim.x = grid;
    blockDim.x = size;
    for (unsigned int block = first; block < stop; ++block) {
        blockIdx.x = order == 1 ? first + stop - 1 - block : block;
        do {
            arrange(turns, size, order);
            for (unsigned int i = 0; i < size; ++i)
                resume(turns[i]);
            for (unsigned int i = 1; i < size; ++i)
                if (threads[i].line != threads[0].line)
                    return threads[i].line > threads[0].line ? threads[i].line : threads[0].line;
        } while (threads[0].line);
    }
    return 0;
}

}  // namespace emulator
