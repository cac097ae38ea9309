// Command ocm is those programs of Open Cluster Management's hub that the tests run, in one: its first argument says
// which. They are OCM's cmd/addon and cmd/placement, without the packages of its other programs, and without servers
// of their own on ports that nobody can choose.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"

	"github.com/openshift/library-go/pkg/controller/controllercmd"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
	"open-cluster-management.io/ocm/pkg/addon"
	webhookv1alpha1 "open-cluster-management.io/ocm/pkg/addon/webhook/v1alpha1"
	webhookv1beta1 "open-cluster-management.io/ocm/pkg/addon/webhook/v1beta1"
	"open-cluster-management.io/ocm/pkg/common/options"
	placement "open-cluster-management.io/ocm/pkg/placement/controllers"
	"open-cluster-management.io/ocm/pkg/version"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
)

func main() {
	command := &cobra.Command{Use: "ocm", SilenceUsage: true}
	command.AddCommand(
		controllers("addon-manager", addon.RunManager),
		controllers("placement", placement.RunControllerManager),
		conversion(),
	)
	if command.Execute() != nil {
		os.Exit(1)
	}
}

// controllers is OCM's pkg/cmd/hub/addon.go and placement.go, without the server for health and metrics.
func controllers(name string, start controllercmd.StartFunc) *cobra.Command {
	opts := options.NewOptions()
	config := opts.NewControllerCommandConfig(name, version.Get(), start, clock.RealClock{})
	config.DisableServing = true
	command := config.NewCommandWithContext(context.TODO())
	command.Use = name
	opts.AddFlags(command.Flags())
	return command
}

// conversion is OCM's pkg/addon/webhook/start.go and pkg/common/options/webhook.go, which also listens on :8000.
func conversion() *cobra.Command {
	var port int
	var certificates string
	command := &cobra.Command{Use: "webhook-server", RunE: func(*cobra.Command, []string) error {
		ctrl.SetLogger(klog.Background())
		scheme := runtime.NewScheme()
		for _, add := range []func(*runtime.Scheme) error{
			clientgoscheme.AddToScheme, webhookv1alpha1.Install, webhookv1beta1.Install,
		} {
			if err := add(scheme); err != nil {
				return err
			}
		}
		config, err := ctrl.GetConfig()
		if err != nil {
			return err
		}
		manager, err := ctrl.NewManager(config, ctrl.Options{
			Scheme:  scheme,
			Metrics: server.Options{BindAddress: "0"},
			WebhookServer: webhook.NewServer(webhook.Options{
				Host: "127.0.0.1", Port: port, CertDir: certificates,
			}),
		})
		if err != nil {
			return err
		}
		for _, each := range []options.WebhookInitializer{
			&webhookv1alpha1.ManagedClusterAddOnWebhook{},
			&webhookv1beta1.ManagedClusterAddOnWebhook{},
			&webhookv1alpha1.ClusterManagementAddOnWebhook{},
			&webhookv1beta1.ClusterManagementAddOnWebhook{},
		} {
			if err := each.Init(manager); err != nil {
				return fmt.Errorf("%T: %w", each, err)
			}
		}
		return manager.Start(ctrl.SetupSignalHandler())
	}}
	command.Flags().AddGoFlag(flag.Lookup("kubeconfig"))
	command.Flags().IntVar(&port, "port", 0, "of 127.0.0.1")
	command.Flags().StringVar(&certificates, "certdir", "", "where tls.crt and tls.key are")
	return command
}
